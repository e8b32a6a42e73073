#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh" phi2 finetune "$@"
