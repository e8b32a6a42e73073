# Phi-4 mini: composed by probes; the template is the one that its tokenizer brings.
NAME=${NAME:-llava-phi4-mini}
MODEL=${MODEL:-microsoft/Phi-4-mini-instruct}
VERSION=${VERSION:-chat_template}
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"
