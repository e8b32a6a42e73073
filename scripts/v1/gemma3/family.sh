# Gemma 3, the text models: composed by probes; the template is the one that their tokenizer brings.
NAME=${NAME:-llava-gemma3-270m}
MODEL=${MODEL:-google/gemma-3-270m-it}
VERSION=${VERSION:-chat_template}
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"
