#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh" openchat pretrain "$@"
