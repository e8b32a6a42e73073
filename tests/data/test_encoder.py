# SPDX-License-Identifier: Apache-2.0
"""The one encoder: ids, labels and media of a record, with and without a model; and where a sample is cut."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from moellava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from moellava.conversation import conv_templates
from moellava.data.dataset import opened, sample_of
from moellava.data.encoder import CountedImages, Encoder, MediaSpan, fitting, image_ids_of
from moellava.data.masking import engine_for
from moellava.data.media import MediaFiles
from moellava.data.preprocess import encode_conversation
from moellava.data.records import Medium
from moellava.data.render import ChatRenderer, TemplateRenderer
from moellava.data.render.jinja import jinja_of
from moellava.data.tokenizers import load_tokenizer, place_image_token
from moellava.data.video import Clip, Video
from moellava.errors import DataError, UserError

IMAGE, VIDEO = IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
PATCHES = 4


@pytest.fixture
def talk(make_record) -> dict:
    """Two rounds that show an image each."""
    return make_record("x", "<image>\nwhat?", "a cat", "and <image>?", "no <image>", image=["a.png", "sub/b.jpg"])


@pytest.fixture
def counted(tokenizers) -> Encoder:
    """Of a tokenizer alone."""
    return Encoder(tokenizers["phi"], TemplateRenderer("phi"), CountedImages(PATCHES))


class Films(CountedImages):
    """A reader that has a way for videos: two positions a frame."""

    reads_videos = True

    def clip_length(self, clip: Clip) -> int:
        return 2 * len(clip.indices)

    def carried(self, text, clips):
        shown = ["image"] * text.count("<image>")
        return text, shown


def video_of(frames: int) -> Video:
    pictures = tuple(Image.new("RGB", (8, 8)) for _ in range(frames))
    return Video(Clip((8, 8), frames, 1.0, tuple(range(frames))), pictures)


def test_a_record_without_a_model(counted, talk):
    example = counted.encode(talk)
    [wanted] = encode_conversation(talk["conversations"], counted.tokenizer, "phi", has_image=True)
    assert (example.ids, example.labels) == (wanted.ids, wanted.labels)
    assert example.ids.count(IMAGE) == 2 and example.is_trained and example.cut == 0
    assert example.media == [Medium("image", "a.png"), Medium("image", "sub/b.jpg")], "no file is looked at"
    assert example.length == len(example.ids) + 2 * (PATCHES - 1)
    assert counted.version == "phi" and counted.in_frames
    trained = [label for label in example.labels if label != IGNORE_INDEX]
    assert counted.tokenizer.decode(trained) == " a cat<|endoftext|> no <image><|endoftext|>"


def test_a_record_of_a_composed_model(composed, image_tree, talk):
    encoder, files = composed.encoder, MediaFiles(image_tree)
    example = encoder.encode(talk, files=files)
    alone = Encoder(composed.tokenizer, TemplateRenderer("v1"), CountedImages(PATCHES)).encode(talk)
    assert dataclasses.asdict(example) == dataclasses.asdict(alone)
    assert encoder.reader.fixed_run.ids == [composed.model.config.image_token_id] * PATCHES
    assert not encoder.looks_at(example.media[0]), "every image is the same run: no file is opened for its length"
    collated = composed.collator()([sample_of(example, opened(example.media, encoder, files), "x")])
    assert collated["input_ids"].shape[1] == example.length and len(collated["pixel_values"]) == 2


def test_a_tag_in_an_answer_is_text_also_where_nothing_is_shown(counted, make_record):
    record = make_record("x", "what stands for an image?", "an <image>")
    example = counted.encode(record)
    assert IMAGE not in example.ids and example.media == [] and not counted.places_media(record)
    assert "an <image>" in counted.tokenizer.decode(example.ids)


@pytest.mark.parametrize("version", ["v1", "qwen", "v1_mmtag", "llama_2", "mpt", "plain"])
def test_a_prompt_is_the_beginning_of_what_training_sees(composed, talk, version):
    encoder = Encoder(composed.tokenizer, TemplateRenderer(version), composed.reader, composed.encoder.image_ids)
    turns = talk["conversations"][: 2 if version == "plain" else 4]
    shown = talk | {"conversations": turns, "image": talk["image"][: len(turns) // 2]}
    for record in (shown, shown | {"system_prompt": "Be brief."}) if version != "plain" else (shown,):
        trained = encoder.encode(record)
        prompt = encoder.encode(record | {"conversations": turns[:-1]}, opens=True)
        end = len(prompt.ids)
        assert (trained.ids[:end], trained.labels[:end]) == (prompt.ids, prompt.labels)
        assert prompt.labels[-1] == IGNORE_INDEX and prompt.media == trained.media
        assert trained.labels[end:] == trained.ids[end:] != [], "from here on the model speaks"


def test_pieces_join_to_the_prompt(counted, talk):
    said = conv_templates["phi"].start()
    for number, turn in enumerate(talk["conversations"][:3]):
        said.append_message(said.roles[number % 2], turn["value"])
    said.append_message(said.roles[1], None)
    asked = talk | {"conversations": talk["conversations"][:3]}
    assert "".join(piece.text for piece in counted.pieces(asked, opens=True)) == said.get_prompt()


WITH_SYSTEM = [name for name in conv_templates if conv_templates[name].system]


@pytest.mark.parametrize("version", WITH_SYSTEM)
def test_a_system_prompt_is_rendered_as_the_saved_template_does(tokenizers, make_record, monkeypatch, version):
    tokenizer = tokenizers["phi"]
    monkeypatch.setattr(tokenizer, "chat_template", jinja_of(version))
    encoder = Encoder(tokenizer, TemplateRenderer(version), CountedImages(1))
    record = make_record("x", "q", "a", "r", "b") | {"system_prompt": "Be brief."}
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    wanted = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *turns], tokenize=False)
    assert "".join(piece.text for piece in encoder.pieces(record)) == wanted
    assert "Be brief." in wanted and conv_templates[version].system not in wanted
    example = encoder.encode(record)
    assert example.ids == engine_for(tokenizer).encode(encoder.pieces(record)).ids
    assert example.labels.count(IGNORE_INDEX) < len(example.labels)


def test_special_tokens_and_tags_in_a_system_prompt_are_text(composed, talk):
    own = composed.encoder.encode(talk | {"system_prompt": "Say </s>, <s> or <image>."})
    bare = composed.encoder.encode(talk | {"system_prompt": "Be brief."})
    tokenizer = composed.tokenizer
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, composed.model.config.image_token_id):
        assert own.ids.count(token) == bare.ids.count(token)
    assert own.ids.count(IMAGE) == bare.ids.count(IMAGE) == 2
    assert "Say </s>, <s> or <image>." in tokenizer.decode([index for index in own.ids if index != IMAGE])


def test_a_system_prompt_that_cannot_act_is_refused(tokenizers, counted, make_record, make):
    record = make_record("x", "<image>", "a cat", image="a.png") | {"system_prompt": "Be brief."}
    plain = Encoder(tokenizers["phi"], TemplateRenderer("plain"), CountedImages(1))
    with pytest.raises(UserError, match="'plain' has no place for a system prompt"):
        plain.encode(record)
    with pytest.raises(DataError, match="Record x of .* has a system prompt, for which --version plain has no place"):
        make([record], version="plain")
    with pytest.raises(DataError, match='The record has a "system_prompt" that is no text: 3'):
        counted.encode(record | {"system_prompt": 3}, "The record")


def test_images_and_videos_may_be_open_already(composed, make_record):
    encoder, files = composed.encoder, MediaFiles()
    images = [Image.new("RGB", (9, 5)), Image.new("RGB", (5, 9))]
    film = video_of(3)
    record = make_record("x", "<image> <video>", "a", "<image>", "b", image=images, video=film)
    example = encoder.encode(record, files=files)
    assert example.media == [Medium("image", images[0]), Medium("video", film), Medium("image", images[1])]
    assert example.ids.count(IMAGE) == 2 + 3, "a video that is open has the frames it has"
    assert example.length == len(example.ids) + 5 * (PATCHES - 1)
    assert opened(example.media, encoder, files) == [images[0], *film.frames, images[1]]
    assert [files.size(medium) for medium in example.media] == [(9, 5), (8, 8), (5, 9)]


def test_a_model_that_reads_paths_takes_no_videos(tokenizers, make_record):
    reader = CountedImages(1)
    reader.loads_images = False
    encoder = Encoder(tokenizers["phi"], TemplateRenderer("phi"), reader)
    with pytest.raises(DataError, match="The record has a video, but this model reads images by their paths"):
        encoder.encode(make_record("x", "<video>", "a", video="a.mp4"), "The record")


IN_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A chat template that writes the processor's placeholder for what its messages show."""


@pytest.fixture
def chats(processor, reader) -> Encoder:
    """An encoder whose template, and not the mask engine, places media."""
    return Encoder(processor.tokenizer, ChatRenderer(processor, IN_PARTS, in_parts=True), reader)


def test_a_chat_template_places_media(chats, talk, make_record):
    example = chats.encode(talk)
    assert example.ids.count(IMAGE) == 2 and chats.reader.placeholder_id not in example.ids
    assert [medium.path for medium in example.media] == ["a.png", "sub/b.jpg"]
    assert example.length == len(example.ids) + 2 * (PATCHES - 1) and not chats.places_media(talk)
    trained = [label for label in example.labels if label != IGNORE_INDEX]
    assert chats.tokenizer.decode(trained) == "a cat<|im_end|>no <image><|im_end|>", "a tag in an answer is text"
    prompt = chats.encode(talk | {"conversations": talk["conversations"][:3]}, opens=True)
    assert example.ids[: len(prompt.ids)] == prompt.ids
    text = chats.encode(make_record("x", "what stands for an image?", "an <image>"))
    assert IMAGE not in text.ids and chats.reader.placeholder_id not in text.ids
    assert chats.encode(talk | {"system_prompt": "No <image>."}).media == example.media


def test_a_template_that_shows_less_than_the_record_has_is_refused(processor, reader, talk):
    once = IN_PARTS.replace("{{ '<image>' }}", "{{ '<image>' if loop.first and m.content | length == 2 }}")
    encoder = Encoder(processor.tokenizer, ChatRenderer(processor, once, in_parts=True), reader)
    with pytest.raises(DataError, match="Record 7 has 2 images, but its chat template shows 1"):
        encoder.encode(talk, "Record 7")


def test_a_video_is_frames_unless_template_and_reader_have_a_way_for_it(chats, counted, make_record, clips):
    record = make_record("x", "<video>\nwhat?", "a", video="shapes.mp4")
    files = MediaFiles(clips, num_frames=3)
    for encoder in (chats, counted):
        example = encoder.encode(record, files=files)
        assert encoder.in_frames and example.ids.count(IMAGE) == 3 and VIDEO not in example.ids
        assert example.media == [Medium("video", "shapes.mp4")]
    films = Encoder(chats.tokenizer, chats.renderer, Films(PATCHES))
    assert not films.in_frames and films.looks_at(Medium("video", "shapes.mp4"))
    assert not films.looks_at(Medium("image", "a.png"))


@pytest.mark.parametrize("enclosed", [False, True])
def test_what_is_cut_is_cut_before_an_image(golden_tokenizers, talk, enclosed):
    tokenizer = load_tokenizer(golden_tokenizers / "phi")
    place_image_token(tokenizer, 51200, ("<image>", "<im_start>", "<im_end>"))
    encoder = Encoder(tokenizer, TemplateRenderer("phi"), CountedImages(PATCHES), image_ids_of(tokenizer, enclosed))
    whole = encoder.encode(talk)
    assert encoder.encode(talk, max_length=whole.length) == whole
    for limit in range(whole.length):
        part = encoder.encode(talk, max_length=limit)
        shown = part.ids.count(IMAGE)
        assert part.ids == whole.ids[: len(part.ids)] and part.labels == whole.labels[: len(part.labels)]
        assert len(part.ids) == len(part.labels) == len(whole.ids) - part.cut
        assert part.media == whole.media[:shown]
        assert part.length == len(part.ids) + shown * (PATCHES - 1) <= limit
        if enclosed:
            start, _, end = encoder.image_ids
            assert part.ids.count(start) == part.ids.count(end) == shown
        following = whole.ids[len(part.ids) :][: len(encoder.image_ids)]
        room = PATCHES - 1 + len(encoder.image_ids) if IMAGE in following[: 1 + enclosed] else 1
        assert limit - part.length < room, "what fits is kept"


def spans(*lengths: int, placeholders: int = 1, modality: str = "image") -> list[MediaSpan]:
    return [MediaSpan(Medium(modality, f"{number}"), placeholders, n) for number, n in enumerate(lengths)]


def ends(ids: list[int], media: dict[int, list[MediaSpan]], limits, around=(0, 0)) -> list[int]:
    return [fitting(ids, media, limit, around)[0] for limit in limits]


def test_everything_fits_without_a_limit():
    media = {IMAGE: spans(3, 5), VIDEO: spans(7, modality="video")}
    ids = [1, VIDEO, 2, IMAGE, IMAGE, 3]
    shown = [media[VIDEO][0].medium, *(span.medium for span in media[IMAGE])]
    assert fitting(ids, media, None) == (6, 3 + 3 + 5 + 7, shown), "media in the order of their placeholders"
    assert fitting(ids, media, 18) == fitting(ids, media, None)
    assert fitting([1, 2], {IMAGE: [], VIDEO: []}, None) == (2, 2, [])
    assert fitting([], {}, 0) == (0, 0, [])


def test_wrapped_images_are_kept_whole():
    ids = [1, 2, 90, IMAGE, 91, 3]
    assert ends(ids, {IMAGE: spans(3)}, (0, 1, 2, 3, 6, 7, 8, 9), (1, 1)) == [0, 1, 2, 2, 2, 5, 6, 6]
    assert fitting([IMAGE, IMAGE, 5], {IMAGE: spans(3, 3)}, 6)[0] == 2
    assert ends([90, 1, 90, IMAGE, 91], {IMAGE: spans(2)}, range(7), (1, 1)) == [0, 1, 2, 2, 2, 2, 5], "a start typed"


def test_the_frames_of_a_video_are_not_parted():
    wrapped = (90, IMAGE, 91)
    ids = [1, *wrapped, *wrapped, 2, *wrapped]  # a video of two frames, and an image; 4 positions each
    media = {IMAGE: [*spans(2, placeholders=2, modality="video"), *spans(2)]}
    assert ends(ids, media, range(16), (1, 1)) == [0, *[1] * 8, 7, *[8] * 4, 11, 11]
    assert fitting(ids, media, 12, (1, 1)) == (8, 10, [Medium("video", "0")])


def test_text_between_the_frames_of_a_video_stays_with_them():
    ids = [1, IMAGE, 7, 7, IMAGE, 2]
    media = {IMAGE: spans(3, placeholders=2, modality="video")}
    assert ends(ids, media, range(11)) == [*[0], *[1] * 8, 5, 6]


def test_images_and_videos_each_take_their_own_length():
    ids = [VIDEO, 1, IMAGE, VIDEO]
    media = {IMAGE: spans(2), VIDEO: spans(3, 5, modality="video")}
    assert ends(ids, media, range(12)) == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3, 4]
    assert fitting(ids, media, 6) == (3, 6, [Medium("video", "0"), Medium("image", "0")])


@st.composite
def samples(draw) -> tuple[list[int], dict[int, list[MediaSpan]], list[tuple[int, int, Medium | None]]]:
    """Ids, their media, and the units that are kept whole, as (ids, positions, medium)."""
    units = draw(st.lists(st.tuples(st.sampled_from(["text", "image", "frames", "video"]), st.integers(1, 5))))
    ids, media, whole = [], {IMAGE: [], VIDEO: []}, []
    for number, (unit, length) in enumerate(units):
        medium = None if unit == "text" else Medium("image" if unit == "image" else "video", str(number))
        placeholders = 3 if unit == "frames" else 1
        if medium is None:
            ids.append(number)
            whole.append((1, 1, None))
            continue
        token = VIDEO if unit == "video" else IMAGE
        ids += [token] * placeholders
        media[token].append(MediaSpan(medium, placeholders, length))
        whole.append((placeholders, placeholders * length, medium))
    return ids, media, whole


@given(sample=samples(), limit=st.none() | st.integers(0, 40))
def test_as_many_units_are_kept_as_fit(sample, limit):
    ids, media, units = sample
    kept, room = 0, sum(positions for _, positions, _ in units) if limit is None else limit
    while kept < len(units) and sum(positions for _, positions, _ in units[: kept + 1]) <= room:
        kept += 1
    wanted = [sum(column) for column in zip(*((n, positions) for n, positions, _ in units[:kept]))] or [0, 0]
    shown = [medium for _, _, medium in units[:kept] if medium is not None]
    assert fitting(ids, media, limit) == (*wanted, shown)
