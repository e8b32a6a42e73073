# Qwen 3: composed by probes; the template is the one that its tokenizer brings.
NAME=${NAME:-llava-qwen3-0.6b}
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
VERSION=${VERSION:-chat_template}
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"
