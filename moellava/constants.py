# SPDX-License-Identifier: Apache-2.0
"""Numbers and token strings that the whole package agrees on."""

import re

IGNORE_INDEX = -100
"""Label of a position that is not trained on (the default of `torch.nn.CrossEntropyLoss`)."""

IMAGE_TOKEN_INDEX = -200
"""Stands once per image in preprocessed `input_ids`; the collator alone replaces it."""

VIDEO_TOKEN_INDEX = -201
"""Stands once per video in preprocessed `input_ids` of a model whose processor reads videos, likewise."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_VIDEO_TOKEN = "<video>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"

CHAT_TEMPLATE = "chat_template"
"""What `--version` calls the chat template of the model's own folder."""

ROLES = ("human", "gpt")
"""What a record calls who asks and who answers."""

MODALITIES = ("image", "video")
"""What a record may show: a key of the record, and the name of the tag that stands for one in its questions."""

TILED = re.compile(r"anyres(?:_max_(?P<cap>[1-9]\d*))?")
"""Values of --image_aspect_ratio that cut images into tiles; `cap` bounds the patches of the tiles of one image, as a
multiple of a tile's."""
