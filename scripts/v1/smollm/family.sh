# SmolLM 2: a Llama whose byte-level BPE brings its template along. Of SmolLM 3 too: MODEL=HuggingFaceTB/SmolLM3-3B.
NAME=${NAME:-llava-smollm2-135m}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
VERSION=${VERSION:-chat_template}
source "$(dirname "${BASH_SOURCE[0]}")/../recipe.sh"
