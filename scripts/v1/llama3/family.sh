# Llama 3.2: a Llama whose byte-level BPE brings its template along.
NAME=${NAME:-llava-llama3.2-1b}
MODEL=${MODEL:-meta-llama/Llama-3.2-1B-Instruct}
VERSION=${VERSION:-chat_template}
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"
