#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh" llama3 finetune_moe "$@"
