# SPDX-License-Identifier: Apache-2.0
"""One-line mutations of the package: what a slip would look like that nobody sees, and the tests that must see it.

Each stands for a mistake that has been made, here or elsewhere, and that no traceback tells of: the run goes on and the
numbers are wrong. `tests/mutants.py` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A change of one place of the package.

    Args:
        name: what it is called by.
        file: below `moellava/`.
        line: the code to search for, which the file holds exactly once; more than one line where one is not unique.
        change: what is put there.
        means: what a user would get.
        killers: files of tests, below `tests/`, that have to fail.
    """

    name: str
    file: str
    line: str
    change: str
    means: str
    killers: tuple[str, ...]


MASKING = (
    Mutation(
        "first-token-of-answers-untrained",
        "data/masking.py",
        "first, last = bisect_left(offsets, (begin,)), bisect_left(offsets, (end,))",
        "first, last = bisect_left(offsets, (begin,)) + 1, bisect_left(offsets, (end,))",
        "The model never learns how an answer begins, which for a yes or no is all of it.",
        ("data/test_masking.py", "data/test_golden_labels.py"),
    ),
    Mutation(
        "questions-trained",
        "conversation.py",
        "else Piece(lead + text, False, Origin.QUESTION)",
        "else Piece(lead + text, True, Origin.QUESTION)",
        "The model learns to ask instead of to answer.",
        ("data/test_golden_labels.py", "test_conversation.py"),
    ),
    Mutation(
        "terminator-untrained",
        "conversation.py",
        "yield Piece(conversation.sep, bool(turn % 2))",
        "yield Piece(conversation.sep)",
        "The model never learns to stop: its answers run on to the limit.",
        ("test_conversation.py", "data/test_golden_labels.py"),
    ),
    Mutation(
        "typed-special-tokens-are-real",
        "data/masking.py",
        'hidden = {token["content"] for token in state["added_tokens"] if token["special"]} | {DEFAULT_IMAGE_TOKEN}',
        "hidden = {DEFAULT_IMAGE_TOKEN}",
        "Who types </s> into a question ends the turn.",
        ("data/test_masking.py",),
    ),
    Mutation(
        "spaces-not-swallowed",
        "data/masking.py",
        "swallows = rule is not None and rule.rstrip",
        "swallows = False",
        "Phi-3 is trained on spaces behind its special tokens that it never reads elsewhere.",
        ("attacks/test_tokenizers.py",),
    ),
    Mutation(
        "untrained-answers-are-samples",
        "data/encoder.py",
        "if is_trained",
        "if number >= 0",
        'Answers with "train": false are trained on where a chat template rewrites earlier turns.',
        ("data/render/test_history.py",),
    ),
    Mutation(
        "answers-trained-again-in-later-samples",
        "data/render/spans.py",
        "return only_last(pieces) if last_only else pieces",
        "return pieces",
        "Early answers of a conversation count several times, without the reasoning that they were given with.",
        ("data/render/test_history.py",),
    ),
    Mutation(
        "beginning-of-sequence-doubled",
        "data/masking.py",
        "leading = [] if spelled else self.leading",
        "leading = self.leading",
        "Chat templates that spell the BOS token give two of them, which the base model has never read.",
        ("data/render/test_chat.py",),
    ),
    Mutation(
        "samples-without-labels-kept",
        "data/encoder.py",
        "return self.labels.count(IGNORE_INDEX) < len(self.labels)",
        "return bool(self.labels)",
        "Records whose answer was cut off or is empty count as data and train nothing.",
        ("data/test_dataset.py",),
    ),
)

ENCODING = (
    Mutation(
        "image-cut-in-half",
        "data/encoder.py",
        "if max_length is not None and positions + taken > max_length:",
        "if max_length is not None and positions >= max_length:",
        "A long sample ends inside an image: it has more positions than were allowed, which is out of memory on a GPU.",
        ("data/test_dataset.py", "data/test_encoder.py", "data/test_media.py"),
    ),
    Mutation(
        "image-lengths-off-by-one",
        "data/encoder.py",
        "total = len(ids) + sum(span.placeholders * (span.length - 1) for span in every)",
        "total = len(ids) + sum(span.placeholders * span.length for span in every)",
        "Samples that just fit are dropped, and the limit of the context is off by one for every image.",
        ("data/test_dataset.py", "data/test_encoder.py"),
    ),
    Mutation(
        "media-miscounted",
        "data/encoder.py",
        "if given != shown:",
        "if given < shown:",
        "A chat template that forgets an image trains on a conversation about an image that is not there.",
        ("data/test_encoder.py",),
    ),
    Mutation(
        "last-frames-never-shown",
        "data/video.py",
        "return tuple(number * (total - 1) // (count - 1) for number in range(count))",
        "return tuple(number * total // count for number in range(count))",
        "How a video ends is never seen.",
        ("data/test_video.py",),
    ),
    Mutation(
        "order-the-same-in-every-epoch",
        "data/sampler.py",
        "generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)",
        "generator = torch.Generator().manual_seed(self.seed * 1_000_003)",
        "Every epoch has the same batches in the same order.",
        ("data/test_sampler.py",),
    ),
)

COLLATING = (
    Mutation(
        "images-trained",
        "data/collate.py",
        'row["labels"] += [IGNORE_INDEX] * len(run.ids)',
        'row["labels"] += run.ids',
        "Most of the loss is the prediction of image placeholders; it falls fast and says nothing.",
        ("data/test_collate.py",),
    ),
    Mutation(
        "padding-attended",
        "data/collate.py",
        'batch["attention_mask"] = torch.zeros(len(rows), width, dtype=torch.long)',
        'batch["attention_mask"] = torch.ones(len(rows), width, dtype=torch.long)',
        "Padding counts as tokens: routers balance it, and the router losses are means over it.",
        ("data/test_collate.py",),
    ),
    Mutation(
        "blank-image-attended",
        "data/collate.py",
        'for name, values in {"input_ids": run.ids, **run.extras}.items():',
        'for name, values in {"input_ids": run.ids, "attention_mask": [1] * len(run.ids), **run.extras}.items():',
        "A black image that nobody gave is part of a text sample.",
        ("data/test_collate.py",),
    ),
    Mutation(
        "questions-never-trained",
        "data/collate.py",
        'row["labels"].append(token if trains_all and number not in begins else label)',
        'row["labels"].append(label)',
        "--mask_question_tokens False is taken and does nothing.",
        ("data/test_collate.py",),
    ),
    Mutation(
        "prompts-padded-on-the-right",
        "data/collate.py",
        "place = slice(width - length, width) if self.for_prompts else slice(0, length)",
        "place = slice(0, length)",
        "In a batch, all answers but the one to the longest prompt are about padding.",
        ("data/test_collate.py", "serve/test_answer.py"),
    ),
)

ROUTING = (
    Mutation(
        "worst-experts-chosen",
        "moe/router.py",
        "score_NE = score_NE.clone()",
        "score_NE = -score_NE",
        "Every token visits the experts that suit it least; training hides it, for the router turns around.",
        ("moe/test_router.py",),
    ),
    Mutation(
        "gates-not-renormalised",
        "moe/router.py",
        "return gate_Nk / gate_Nk.sum(1, keepdim=True).clamp_min(torch.finfo(gate_Nk.dtype).eps)",
        "return gate_Nk",
        "Sparse layers say less than the dense ones did: upcycling is no longer exact.",
        ("moe/test_router.py", "moe/test_upcycle.py"),
    ),
    Mutation(
        "single-choice-router-starved",
        "moe/router.py",
        "return gate_Nk / prob_NE.detach().gather(1, choice.expert_Nk)",
        "return gate_Nk / prob_NE.gather(1, choice.expert_Nk)",
        "With one expert a token, the router learns nothing from the answers.",
        ("moe/test_router.py",),
    ),
    Mutation(
        "capacity-ignored",
        "moe/router.py",
        "return (place <= limit).view(expert_Nk.shape[1], -1).t()",
        "return (place <= len(place)).view(expert_Nk.shape[1], -1).t()",
        "--capacity_factor is taken and drops nothing; published models answer otherwise than they were trained.",
        ("moe/test_router.py", "moe/test_upcycle.py"),
    ),
    Mutation(
        "evaluation-has-the-capacity-of-training",
        "moe/router.py",
        "factor = spec.capacity_factor if training else spec.eval_capacity_factor",
        "factor = spec.capacity_factor",
        "--eval_capacity_factor does nothing; published models drop tokens that they should read.",
        ("moe/test_router.py",),
    ),
    Mutation(
        "padding-routed",
        "moe/context.py",
        "token_N = every_T[mask_T.to(device)] if self.places is None else self.places.to(device)",
        "token_N = every_T",
        "Balancing losses and loads are those of the padding.",
        ("moe/test_upcycle.py",),
    ),
    Mutation(
        "routing-redone-on-recompute",
        "moe/context.py",
        "return _Enter(region, replay=False), _Enter(region, replay=True)",
        "return _Enter(region, replay=False), _Enter(region, replay=False)",
        "Under gradient checkpointing a token's gradient may go to an expert that it has not visited.",
        ("moe/test_context.py",),
    ),
    Mutation(
        "balancing-bias-the-wrong-way",
        "moe/losses.py",
        "bias_E += rate * torch.sign(choices_E.mean() - choices_E)",
        "bias_E += rate * torch.sign(choices_E - choices_E.mean())",
        "--router_balance bias makes the fullest expert fuller until it has all tokens.",
        ("moe/test_losses.py",),
    ),
)

LOSSES = (
    Mutation(
        "router-losses-per-micro-batch",
        "moe/losses.py",
        "aux_per_layer.append(aux / tokens)",
        "aux_per_layer.append(aux / max(record.n_tokens, 1))",
        "The balancing loss weighs as many times as there are micro-batches and ranks.",
        ("moe/test_losses.py",),
    ),
    Mutation(
        "z-loss-not-squared",
        "moe/losses.py",
        "z=routing.logit_NE.logsumexp(1).square().sum(),",
        "z=routing.logit_NE.logsumexp(1).sum(),",
        "--router_z_loss_coef pushes logits towards minus infinity.",
        ("moe/test_losses.py",),
    ),
    Mutation(
        "cross-entropy-averaged-twice",
        "train/loss.py",
        'reduction="sum", label_smoothing=label_smoothing)',
        'reduction="mean", label_smoothing=label_smoothing)',
        "The loss is divided by its tokens twice: the learning rate is a thousandth of what was asked for.",
        ("train/test_loss.py",),
    ),
    Mutation(
        "labels-not-shifted",
        "train/loss.py",
        "shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)",
        "shifted = labels",
        "The model learns to repeat the token that it reads: the loss goes to 0 and every answer is noise.",
        ("train/test_loss.py",),
    ),
    Mutation(
        "rows-that-are-read-left-out",
        "train/rows.py",
        "return alike",
        "return True",
        "A model whose last layer's other positions are read (by a mean over them) learns from zeros there.",
        ("train/test_rows.py",),
    ),
)

PACKING = (
    Mutation(
        "samples-of-a-row-read-each-other",
        "data/collate.py",
        "for start, end in zip(starts, ends, strict=False) for place in range(end - start)]",
        "for start, end in zip(starts, ends, strict=False) for place in range(start, end)]",
        "With --packing, the second sample of a row is answered with the first one in sight.",
        ("data/test_packing.py", "train/test_packing.py"),
    ),
    Mutation(
        "first-token-predicted-from-another-sample",
        "data/collate.py",
        "label = IGNORE_INDEX  # what would predict it is another sample",
        "pass",
        "With --packing, the end of a sample learns to predict how an unrelated one begins.",
        ("data/test_packing.py",),
    ),
    Mutation(
        "padding-continues-the-last-sample",
        "data/collate.py",
        'batch["position_ids"][number, length:] = torch.arange(width - length)',
        'batch["position_ids"][number, length:] = torch.arange(length, width)',
        "With --packing, padding and blank images are part of a row's last sample.",
        ("data/test_packing.py",),
    ),
    Mutation(
        "row-balanced-as-one-sequence",
        "moe/context.py",
        "return Tokens(token_N, image_N, sequences[0].to(device), sequences[1])",
        "return Tokens(token_N, image_N, real_N // shape[1], shape[0])",
        "With --packing, the balancing loss per sequence is one per row.",
        ("train/test_packing.py",),
    ),
    Mutation(
        "packing-not-tried-out",
        "train/packing.py",
        "if not found <= allowed:",
        "if found < 0:",
        "--packing is taken for models whose samples read each other.",
        ("train/test_packing.py", "lmm/test_packing.py"),
    ),
    Mutation(
        "some-samples-in-no-row",
        "data/packing.py",
        "rows += _best_fit(members[begin : begin + WINDOW], lengths, capacity)",
        "rows += _best_fit(members[begin : begin + WINDOW - 1], lengths, capacity)",
        "With --packing, an epoch leaves records out.",
        ("data/test_packing.py",),
    ),
)

KERNEL_SLIPS = (
    Mutation(
        "gradient-of-another-activation",
        "moe/activations.py",
        'lambda x, grad: ops.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),',
        "lambda x, grad: ops.silu_backward.grad_input(grad, x, grad_input=grad),",
        "Experts of Phi and Gemma learn by the gradient of another function; the loss still falls.",
        ("moe/test_activations.py", "moe/test_fused.py"),
    ),
    Mutation(
        "any-function-is-a-kernel",
        "moe/activations.py",
        "if wanted.shape == x.shape and bool(((out - wanted).abs() <= SAME).all()):",
        "if wanted.shape == x.shape:",
        "Whatever activation a model has, its experts compute SiLU.",
        ("moe/test_activations.py",),
    ),
    Mutation(
        "experts-stacked-in-any-order",
        "moe/places.py",
        "if len(alike) > 1 or len(steps) > 1 or min(steps, default=1) <= 0 or first.device.type",
        "if len(alike) > 1 or first.device.type",
        "On a GPU, tokens are run by experts that they have not chosen.",
        ("moe/test_fused.py",),
    ),
    Mutation(
        "autocast-left-to-the-loop",
        "moe/experts.py",
        "fusable, cast_TD = tensors_of(experts), x_TD.to(dtype)",
        "fusable, cast_TD = None if dtype != x_TD.dtype else tensors_of(experts), x_TD.to(dtype)",
        "Every --bf16 run without DeepSpeed calls its experts one by one.",
        ("moe/test_fused.py",),
    ),
    Mutation(
        "adapters-of-experts-unscaled",
        "moe/grouped.py",
        "offs=ends_E) * first.scale",
        "offs=ends_E)",
        "On a GPU, the adapters of experts say another multiple than they do once they are merged.",
        ("moe/test_adapted.py",),
    ),
)

CHUNKS = (
    Mutation(
        "chunks-not-weighed",
        "train/loss.py",
        "label_smoothing).mul_(dloss).to(dtype)",
        "label_smoothing).to(dtype)",
        "With a large vocabulary the gradient is as many times too large as a step has tokens.",
        ("train/test_loss.py",),
    ),
    Mutation(
        "one-chunk-learnt-from",
        "train/loss.py",
        "for begin in range(0, len(hidden_ND), rows):",
        "for begin in range(0, min(len(hidden_ND), rows), rows):",
        "With a large vocabulary only the first answers of a batch train the head.",
        ("train/test_loss.py",),
    ),
    Mutation(
        "scaled-logits-in-chunks",
        "train/loss.py",
        "self.is_last = logits.shape == self._said.shape and torch.equal(logits, self._said.to(logits.dtype))",
        "self.is_last = True",
        "Models that scale or cap their logits after the head are trained as if they did not.",
        ("train/test_loss.py",),
    ),
    Mutation(
        "smoothing-dropped-in-chunks",
        "train/loss.py",
        "if label_smoothing:",
        "if not label_smoothing:",
        "--label_smoothing_factor changes the loss that is shown, and the gradient wrongly.",
        ("train/test_loss.py",),
    ),
)

UPCYCLING = (
    Mutation(
        "slices-not-scaled",
        "moe/mlp.py",
        "setattr(part, layout.output, _linear(output.weight[:, units] * of, output.bias))",
        "setattr(part, layout.output, _linear(output.weight[:, units], output.bias))",
        "--init granular starts from a model whose sparse layers say a fraction of what they should.",
        ("moe/test_upcycle.py",),
    ),
    Mutation(
        "slices-of-one-mlp-torn-apart",
        "moe/upcycle.py",
        "draw(n_experts // spec.granularity).repeat_interleave(spec.granularity, dim=0)",
        "draw(n_experts)",
        "--init granular mixes slices of different MLPs from the first step on.",
        ("moe/test_upcycle.py",),
    ),
    Mutation(
        "experts-share-one-tensor",
        "moe/upcycle.py",
        "if slices > 1 else _copied(mlp)",
        "if slices > 1 else mlp",
        "All experts of a layer are one: the sparse model is the dense one and stays so.",
        ("moe/test_upcycle.py",),
    ),
    Mutation(
        "every-layer-draws-the-same",
        "moe/upcycle.py",
        "generator = torch.Generator().manual_seed(spec.init_seed * 100_003 + layer_index)\n    drawn =",
        "generator = torch.Generator().manual_seed(spec.init_seed * 100_003)\n    drawn =",
        "The routers of all layers start equal, and `moellava upcycle` gives other models than `train.py`.",
        ("moe/test_upcycle.py", "convert/test_upcycle_folder.py"),
    ),
    Mutation(
        "streamed-routers-rounded",
        "convert/streaming.py",
        'dtype = tensor.dtype if name.startswith(f"{prefix}router.") else dtypes.get(prefix + parts[0])',
        "dtype = dtypes.get(prefix + parts[0])",
        "`moellava upcycle` writes the routers of a 16-bit folder in 16 bits, in which they confuse near ties.",
        ("convert/test_upcycle_folder.py",),
    ),
    Mutation(
        "published-routing-as-ours",
        "moe/spec.py",
        'if "format" in section:',
        "if section:",
        "A published MoE-LLaVA is routed by today's defaults, without capacity: its answers are others.",
        ("moe/test_spec.py", "model/test_published.py"),
    ),
    Mutation(
        "certificate-of-no-numbers",
        "moe/certificate.py",
        'if self.exact_in_theory and not probe["max_abs_delta"] <= limit:',
        'if self.exact_in_theory and probe["max_abs_delta"] > limit:',
        "A conversion whose logits are NaN is certified as exact.",
        ("moe/test_certificate.py",),
    ),
)

SAVING = (
    Mutation(
        "head-of-its-own-lost",
        "model/saving.py",
        'if getattr(model.config.get_text_config(), "tie_word_embeddings", False):',
        'if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):',
        "The folder lacks the head that was trained, or holds a tied one twice.",
        ("model/test_saving.py",),
    ),
    Mutation(
        "experts-of-every-rank-are-the-first",
        "moe/deepspeed.py",
        "return (rank() % self.ep_size) * self.num_local_experts",
        "return 0",
        "At --ep_size 2 the second rank's experts are saved over the first one's.",
        ("moe/test_deepspeed.py",),
    ),
    Mutation(
        "config-moves-first",
        "files.py",
        "key=lambda file: (file.name == CONFIG, file.name)",
        "key=lambda file: (file.name != CONFIG, file.name)",
        "A run that is killed while it saves leaves a folder that opens, with old weights under a new config.",
        ("test_files.py",),
    ),
    Mutation(
        "stage-not-noted",
        "model/saving.py",
        "note(model.config, **meta)",
        "note(model.config)",
        "A folder does not say which stage left it.",
        ("model/test_saving.py",),
    ),
    Mutation(
        "earlier-template-outlives-the-stage",
        "model/saving.py",
        "tokenizer.chat_template = processor.chat_template",
        "pass",
        "Plain transformers renders prompts with the base model's template, which the stage has not trained on.",
        ("model/test_saving.py",),
    ),
    Mutation(
        "old-section-misread",
        "model/section.py",
        'OLD_NAMES = {"lmm_family": "architecture"}',
        "OLD_NAMES: dict[str, str] = {}",
        "A released model that an older moellava fine-tuned is opened as if it were composed.",
        ("model/test_section.py",),
    ),
)

RESUMING = (
    Mutation(
        "finished-runs-run-again",
        "train/checkpoint.py",
        'return bool(stored["finished"])',
        "return False",
        "The same command trains a finished model once more, from its last checkpoint.",
        ("train/test_checkpoint.py",),
    ),
    Mutation(
        "checkpoints-in-the-order-of-text",
        "train/checkpoint.py",
        "sorted((int(match[1]), path) for match, path in found if match)",
        "sorted((match[1], path) for match, path in found if match)",
        "A killed run goes on from step 900 instead of 1000, and 1000 is the one that is removed.",
        ("train/test_checkpoint.py",),
    ),
    Mutation(
        "newest-checkpoints-removed",
        "train/checkpoint.py",
        "for old in complete_checkpoints(output_dir)[:-keep]:",
        "for old in complete_checkpoints(output_dir)[keep:]:",
        "--save_total_limit keeps the oldest checkpoints.",
        ("train/test_checkpoint.py",),
    ),
    Mutation(
        "sampler-not-told-the-epoch",
        "train/run_hooks.py",
        "self.trainer.train_sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))",
        "self.trainer.train_sampler.set_epoch(0)",
        "A run of several epochs reads the same batches in the same order in each of them.",
        ("train/test_trainer.py",),
    ),
    Mutation(
        "order-depends-on-the-processes",
        "data/sampler.py",
        "return self.batch_size * self.world_size * self.accumulation",
        "return self.batch_size * self.world_size",
        "A run that goes on with half of the processes and twice the passes shows some records twice.",
        ("data/test_order.py",),
    ),
    Mutation(
        "weights-not-taken-from-the-checkpoint",
        "train/trainer.py",
        "self.folder.load(model or self.model, Path(resume_from_checkpoint))",
        "self.folder.load(model, Path(resume_from_checkpoint)) if model else None",
        "A resumed run goes on at step 1000 with the weights of step 0.",
        ("train/test_train.py",),
    ),
    Mutation(
        "portable-states-under-local-names",
        "train/deepspeed/portable.py",
        "yield names.get(name, name), parameter,",
        "yield name, parameter,",
        "A run that goes on with another --ep_size gives experts the optimizer states of others.",
        ("train/deepspeed/test_portable.py",),
    ),
    Mutation(
        "schedule-of-sharded-runs-begins-anew",
        "train/fsdp_trainer.py",
        'group["lr"] = rate * factor(schedule.last_epoch)',
        'group["lr"] = rate',
        "The first step of a run that goes on under --fsdp_size is made at the full rate.",
        ("train/test_fsdp.py",),
    ),
    Mutation(
        "states-of-another-engine-left-out",
        "train/fsdp.py",
        "if there != fsdp:",
        "if False:",
        "A run that goes on without --fsdp_size begins with empty optimizer states.",
        ("train/test_fsdp.py",),
    ),
    Mutation(
        "accumulated-steps-too-long",
        "train/trainer.py",
        "loss = ce * (1 if own_mean else processes) / torch.as_tensor(num_items_in_batch).clamp_min(1)",
        "loss = ce * (1 if own_mean else processes) / max(len(supervised.target_N), 1)",
        "With --gradient_accumulation_steps 8 the gradient is eight times what one big batch gives.",
        ("train/test_trainer.py",),
    ),
)

STAGES = (
    Mutation(
        "language-model-trains-in-stage-1",
        "train/stages.py",
        'chosen = list(vlm.parts["projector"].parameters())\n    if',
        'chosen = [*vlm.parts["projector"].parameters(), *vlm.parts["language_model"].parameters()]\n    if',
        "Captions overwrite what the language model knows.",
        ("train/test_stages.py",),
    ),
    Mutation(
        "projector-frozen-in-stage-2",
        "train/stages.py",
        "with_projector = vlm.trains_projector and not args.freeze_mm_mlp_adapter",
        "with_projector = False",
        "The language model has to learn around a projector that has only seen captions.",
        ("train/test_stages.py",),
    ),
    Mutation(
        "routers-frozen-in-stage-3",
        "train/stages.py",
        "return list(expert_parameters(vlm.model)) + beside_experts(vlm, args, moe)",
        "return list(expert_parameters(vlm.model))",
        "Experts learn on tokens that a random router deals out for ever.",
        ("train/test_stages.py",),
    ),
    Mutation(
        "parts-by-letters",
        "model/parts.py",
        'if components[: keyword.count(".") + 1] == keyword.split(".")',
        'if ".".join(components).startswith(keyword)',
        "A keyword takes its neighbour along: `visual` freezes `visual_projector` as well.",
        ("model/test_parts.py", "lmm/test_parts.py"),
    ),
    Mutation(
        "projector-learning-rate-ignored",
        "train/optimizer.py",
        '"lr": projector_lr if part == "projector" else learning_rate,',
        '"lr": learning_rate,',
        "--mm_projector_lr is taken and does nothing.",
        ("train/test_optimizer.py",),
    ),
    Mutation(
        "norms-decay",
        "train/optimizer.py",
        "decays = parameter.ndim > 1 and weight_decay > 0",
        "decays = weight_decay > 0",
        "--weight_decay pulls the norms' weights to 0.",
        ("train/test_optimizer.py",),
    ),
    Mutation(
        "adapters-merged-unscaled",
        "adapters/folder.py",
        "value = (value.float() + scaling * (b @ a)).to(value.dtype).cpu()",
        "value = (value.float() + b @ a).to(value.dtype).cpu()",
        "The merged model is not what was trained and evaluated: alpha / r is lost.",
        ("adapters/test_lora.py",),
    ),
)

ANSWERING = (
    Mutation(
        "answers-end-in-the-terminator",
        "serve/ending.py",
        "said = said.split(self.plain, 1)[0]",
        "said = said.strip()",
        "Answers of models with ### end in ###, and an exact match is none.",
        ("serve/test_ending.py",),
    ),
    Mutation(
        "image-tokens-answered",
        "serve/generate.py",
        "return scores.index_fill(-1, torch.tensor(known, dtype=torch.long, device=scores.device), -math.inf)",
        "return scores",
        "A model says an image token, and the next step fails or reads it as a patch.",
        ("serve/test_generate.py",),
    ),
    Mutation(
        "padding-takes-room-of-prompts",
        "serve/generate.py",
        "set_routing_context(model, token_mask=mask_BL[:, -length:].bool())",
        "set_routing_context(model)",
        "Where capacity is limited, an answer depends on how much longer the batch's other prompts are.",
        ("serve/test_generate.py",),
    ),
    Mutation(
        "step-forgets-the-gates",
        "moe/few_tokens.py",
        "y_RD = y_RD * gate_Tk.flatten()[order_R].unsqueeze(1)",
        "y_RD = y_RD * gate_Tk.flatten().unsqueeze(1)",
        "In a batch, each token's experts count as much as another token's: answers are worse than alone.",
        ("moe/test_few_tokens.py",),
    ),
    Mutation(
        "pictures-of-one-size-are-one",
        "model/features.py",
        "digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())",
        "digest.update(b'')",
        "Every picture after the first is answered as if it were the first.",
        ("model/test_features.py", "lmm/test_features.py"),
    ),
    Mutation(
        "features-outlive-their-weights",
        "model/features.py",
        "if weights != self.weights:",
        "if self.weights is None:",
        "A model that has learnt on answers about pictures as it saw them before.",
        ("model/test_features.py",),
    ),
    Mutation(
        "answers-swapped",
        "serve/answer.py",
        "for index, tokens in zip(shown, said, strict=True)}",
        "for index, tokens in zip(sorted(shown), said, strict=True)}",
        "Questions of different lengths get each other's answers; scores of a benchmark fall to chance.",
        ("serve/test_answer.py",),
    ),
)

PROBING = (
    Mutation(
        "norms-of-the-tower-are-the-projectors",
        "model/vision_probes.py",
        "return reached - norms",
        "return reached",
        "Norms beside the encoder's blocks train with the projector, and rest with it.",
        ("lmm/test_any_released_model.py",),
    ),
    Mutation(
        "blocks-are-any-list-of-modules",
        "model/vision_probes.py",
        "min(outcomes, key",
        "max(outcomes, key",
        "Qwen3-VL's blocks train with its mergers where only the projector should.",
        ("lmm/test_any_released_model.py",),
    ),
    Mutation(
        "parts-found-too-late-to-be-saved",
        "vlm.py",
        "    keywords = description.keywords  # so is what cannot be taken apart; and the config learns of it\n"
        "    model = description.load(dtype)\n",
        "    model = description.load(dtype)\n    keywords = description.keywords\n",
        "A model that cannot be taken apart is told after gigabytes are read, and its folder forgets its parts.",
        ("lmm/test_any_released_model.py",),
    ),
    Mutation(
        "softcap-not-looked-for",
        "model/probes.py",
        "logits_at(model, source, ids, LOUD / max(largest, 1e-6))",
        "logits_at(model, source, ids, 1.0)",
        "Gemma 2 in half precision is composed without its cap, and its logits are a little off for ever.",
        ("model/test_any_language_model.py",),
    ),
    Mutation(
        "logits-factor-lost",
        "model/any_language_model.py",
        "scaled(anatomy.head.weight.detach(), anatomy.head.scale)",
        "anatomy.head.weight.detach()",
        "Cohere and Granite say the same words, at another temperature: sampling and the loss are wrong.",
        ("model/test_any_language_model.py",),
    ),
    Mutation(
        "formula-taken-for-the-module",
        "moe/weights.py",
        "found = [layout for layout in layouts_of(module) if _says_all(module, layout)]",
        "found = layouts_of(module)",
        "Experts of BitNet and Gemma 3n compute without the norm or the cut in their middle.",
        ("moe/test_decoder.py",),
    ),
    Mutation(
        "own-balance-dropped",
        "train/trainer.py",
        "loss = loss + aux * self.own_routers.coefficient",
        "loss = loss + 0 * aux",
        "A sparse language model is fine-tuned without its balancing loss, and its experts drift apart.",
        ("train/test_trainer.py",),
    ),
)

TRUST = (
    Mutation(
        "damaged-weights-are-a-start",
        "model/integrity.py",
        "    problems = digest_problems(folder, recorded)",
        "    problems = dict[str, str]()",
        "A run starts from weights of which a byte has flipped, and writes them out again with new digests.",
        ("model/test_integrity.py",),
    ),
    Mutation(
        "a-folders-plug-in-runs-unasked",
        "plugins.py",
        "        elif name not in PLUGINS and not trust_remote_code:",
        "        elif name not in PLUGINS and False:",
        "Python that lies in a folder from elsewhere runs as soon as the folder is opened.",
        ("test_plugins.py",),
    ),
    Mutation(
        "media-from-anywhere",
        "data/media.py",
        "        if self.confined and not within(path, folder):",
        "        if self.confined and False:",
        "--confine_media lets records read any file of the machine.",
        ("data/test_media.py",),
    ),
    Mutation(
        "images-of-any-size",
        "data/images.py",
        "                limits.check(image.size, str(path))",
        "                pass",
        "One image of 1 x 10,000 pixels, and the run takes gigabytes.",
        ("data/test_images_attacked.py",),
    ),
)

TOWERS = (
    Mutation(
        "second-tower-sees-the-first-ones-picture",
        "model/joined_towers.py",
        "pixel_values[:, :, top : top + side, :side]",
        "pixel_values[:, :, :side, :side]",
        "The second of two towers reads pixels in the first one's normalisation and size, and learns less.",
        ("model/test_any_tower.py",),
    ),
    Mutation(
        "registers-kept",
        "model/towers.py",
        'leaves_out = first.extras > 1 and select_feature == "patch"',
        "leaves_out = False",
        "Of five class and register tokens of DINOv2 four are taken for patches, and the last tokens are one too many.",
        ("model/test_any_tower.py",),
    ),
    Mutation(
        "class-token-kept",
        "model/towers.py",
        'return "default" if select_feature == "patch" and tower_shape(tower).extras else "full"',
        'return "full"',
        "The class token is read as the first patch, although the folder says patch.",
        ("model/test_towers.py", "model/test_any_tower.py"),
    ),
    Mutation(
        "missing-weights-of-a-tower-are-random",
        "model/towers.py",
        'wrong = sorted(needed & set(info["missing_keys"]))',
        "wrong = sorted([])",
        "A tower whose folder lacks a layer runs with a random one.",
        ("model/test_towers.py",),
    ),
    Mutation(
        "another-part-of-the-image-is-seen",
        "model/tower_images.py",
        "round(side * shortest / old) if shortest and old else side",
        "side",
        "Pictures that are brought to a tower's size show more of an image than its own processor does.",
        ("model/test_any_tower.py",),
    ),
)

SERVING = (
    Mutation(
        "half-a-key-is-a-key",
        "serve/api/guard.py",
        "return hmac.compare_digest(given, key.encode())",
        "return hmac.compare_digest(given[:3], key.encode()[:3])",
        "Whoever knows how a key begins may ask.",
        ("serve/api/test_limits.py",),
    ),
    Mutation(
        "redirects-are-followed",
        "serve/api/remote.py",
        "follow_redirects=False",
        "follow_redirects=True",
        "A host that is allowed sends the server to one that is not, in the owner's own network.",
        ("serve/api/test_limits.py",),
    ),
    Mutation(
        "answers-go-on-for-nobody",
        "serve/api/scheduler.py",
        "            self.left.set()\n\n\nclass Scheduler",
        "            pass\n\n\nclass Scheduler",
        "A client that leaves holds the model until its answer is complete.",
        ("serve/api/test_limits.py",),
    ),
    Mutation(
        "options-of-the-first-for-all",
        "serve/api/scheduler.py",
        "_options(first.question.sampling) == _options(other.question.sampling)",
        "True",
        "Who asks for the likeliest tokens is answered by drawn ones, when others wait.",
        ("serve/api/test_api.py",),
    ),
    Mutation(
        "padding-visits-experts",
        "serve/api/experts.py",
        "return part_BL if mask_BL is None else part_BL.masked_fill(mask_BL == 0, PADDING)",
        "return part_BL",
        "The panel counts padding as words of the prompt, when others are answered at the same time.",
        ("serve/api/test_experts.py",),
    ),
    Mutation(
        "tokens-behind-a-stop-are-told",
        "serve/api/growing.py",
        "            self.tokens = self.tokens[:said]",
        "            self.tokens = self.tokens[: said + 1]",
        "Likelihoods are told of a token that is no part of the answer.",
        ("serve/api/test_growing.py", "serve/api/test_api.py"),
    ),
)

EXPORTING = (
    Mutation(
        "shared-expert-counts-half",
        "convert/export/targets/qwen2_moe.py",
        "    return tensor * 2",
        "    return tensor * 1",
        "A model with a shared expert answers otherwise in every engine.",
        ("convert/test_export_targets.py",),
    ),
    Mutation(
        "rows-of-queries-as-they-were",
        "convert/export/targets/ernie_moe.py",
        "return halves.transpose(1, 2).reshape(tensor.shape).contiguous()",
        "return halves.reshape(tensor.shape).contiguous()",
        "Positions are turned in the wrong pairs of units: long answers fall apart.",
        ("convert/test_export_targets.py",),
    ),
    Mutation(
        "any-logits-pass",
        "convert/export/proof.py",
        "        if not delta <= limit:",
        "        if delta < 0:",
        "A folder that computes something else is written with a certificate.",
        ("convert/test_export.py",),
    ),
    Mutation(
        "towers-without-their-prefix",
        "convert/export/native.py",
        'inner = "vision_model." if is_tower',
        'inner = "" if is_tower',
        "vLLM finds no weights for the tower.",
        ("convert/test_export_targets.py",),
    ),
    Mutation(
        "drops-are-not-told",
        "convert/export/export_folder.py",
        "    if drops and not dropless:",
        "    if drops and dropless is None:",
        "A model that drops tokens is exported as one that does not, without a word.",
        ("convert/test_export.py",),
    ),
    Mutation(
        "adapters-of-another-order",
        "convert/export/adapter.py",
        "    return Matrices(torch.cat([expert.a for expert in experts]), b.flatten(1))",
        "    return Matrices(torch.cat([expert.a for expert in experts]), b.transpose(1, 2).flatten(1))",
        "Each expert gets rows of other experts' adapters.",
        ("convert/test_export_targets.py",),
    ),
)

KEEPING = (
    Mutation(
        "lengths-outlive-their-images",
        "data/judge.py",
        "np.where(decides[shown.modality], states, np.uint64(0))",
        "np.where(decides[shown.modality] & False, states, np.uint64(0))",
        "An image is exchanged for a larger one, and its sample is longer than --model_max_length says.",
        ("data/test_judge.py",),
    ),
    Mutation(
        "equal-records-become-many-samples",
        "data/judge.py",
        "kept.add(judged.only(np.isin(judged.numbers, firsts)).rows)",
        "kept.add(judged.rows)",
        "A record that stands twice in the data is four samples from the second start on.",
        ("data/test_judge.py",),
    ),
    Mutation(
        "lengths-outlive-the-template",
        "data/judge.py",
        "return [fingerprint(self.encoder), self.files.settings",
        'return ["", self.files.settings',
        "Another template or tokenizer trains with the lengths of the first.",
        ("data/test_judge.py",),
    ),
    Mutation(
        "files-that-have-changed-are-not-read",
        "data/indexing.py",
        "state = [os.path.realpath(name), size, changed]",
        "state = [os.path.realpath(name)]",
        "A data file is mended, and the run trains on what it held before.",
        ("data/test_index.py",),
    ),
    Mutation(
        "some-records-come-three-times",
        "data/mixtures.py",
        "sorted(list(rows) * times + random.Random(seed).sample(rows, rest))",
        "sorted(list(rows) * times + random.Random(seed).choices(rows, k=rest))",
        "Of a mixture's records, some come far more often than others.",
        ("data/test_formats.py",),
    ),
)


SEEING = (
    Mutation(
        "map-turned",
        "vis/patches.py",
        "(self.first + row * self.pitch + column, row, column)",
        "(self.first + row * self.pitch + column, column, row)",
        "The map of experts over a picture is turned about its diagonal.",
        ("vis/test_patches.py",),
    ),
    Mutation(
        "chance-tells",
        "vis/measures.py",
        "return max(bits - float(chance), 0.0)",
        "return max(bits, 0.0)",
        "Experts that few tokens were seen of look specialised.",
        ("vis/test_measures.py",),
    ),
    Mutation(
        "padding-seen",
        "vis/collect.py",
        "rows = np.arange(total) if one.token_N is None else one.token_N.numpy()",
        "rows = np.arange(len(one.expert_Nk))",
        "Behind padding, tokens are shown with the experts of others.",
        ("vis/test_routing.py",),
    ),
    Mutation(
        "steps-logged-twice",
        "train/run_log.py",
        'return 0 < step >= line.get("step", 0) and line.get("event") != "end"',
        'return 0 < step and line.get("event") != "end"',
        "Steps that a run makes again after a stop stand twice in its log, and in its totals.",
        ("train/test_run_log.py",),
    ),
)

SCORING = (
    Mutation(
        "agreed-answers-are-processed",
        "eval/vqa_text.py",
        "    if len(set(answers)) > 1:",
        "    if answers:",
        "VQA scores that the official script does not give.",
        ("eval/test_scorers.py",),
    ),
    Mutation(
        "one-turn-of-the-options-is-enough",
        "eval/mmbench.py",
        "whole[question.unit] = whole.get(question.unit, True) and hit",
        "whole[question.unit] = whole.get(question.unit, False) or hit",
        "MMBench as if guessing 'A' every time were an answer.",
        ("eval/test_scorers.py",),
    ),
    Mutation(
        "differences-are-not-paired",
        "eval/tally.py",
        "return difference, around(difference, deviation(self._without_each() - other._without_each()))",
        "return difference, around(difference, deviation(self._without_each()))",
        "Two models that fail at the same questions seem not to differ.",
        ("eval/test_tally.py",),
    ),
    Mutation(
        "questions-about-one-image-are-independent",
        "eval/benchmarks.py",
        "            return self.about",
        '            return f"question {self.id}"',
        "Intervals far too narrow: a hundred questions about ten images count as a hundred images.",
        ("eval/test_benchmarks.py",),
    ),
    Mutation(
        "half-a-line-is-gone-on-with",
        "eval/journal.py",
        "os.truncate(self.part, content",
        "_ = (self.part, content",
        "After a kill an answer is lost in the half of another.",
        ("eval/test_journal.py",),
    ),
    Mutation(
        "answered-questions-are-asked-again",
        "eval/asking.py",
        "pending = share.of(place for place in range(len(questions)) if place not in rows)",
        "pending = share.of(range(len(questions)))",
        "A run that was killed begins anew.",
        ("eval/test_tasks.py",),
    ),
)

SHARING = (
    Mutation(
        "a-users-own-card-is-overwritten",
        "model/page.py",
        "return found is not None and found[1] == _digest(page[: found.start()])",
        "return found is not None",
        "What a user has written on a model card is lost at the next save.",
        ("model/test_page.py",),
    ),
    Mutation(
        "a-token-in-the-log",
        "train/hf_flags.py",
        """return f"--{name} {'…' if name in SECRETS else word(value)}\"""",
        'return f"--{name} {word(value)}"',
        "A refused flag prints the user's token of the hub into the log.",
        ("train/test_hub.py",),
    ),
    Mutation(
        "histograms-out-of-order",
        "train/trackers.py",
        "np.array([values[expert] for expert in sorted(values)])",
        "np.array(list(values.values()))",
        "A tracker shows the load of one expert as another's.",
        ("train/test_trackers.py",),
    ),
)

MUTATIONS = (
    *MASKING,
    *PROBING,
    *TOWERS,
    *ENCODING,
    *COLLATING,
    *ROUTING,
    *LOSSES,
    *PACKING,
    *KERNEL_SLIPS,
    *CHUNKS,
    *UPCYCLING,
    *SAVING,
    *RESUMING,
    *STAGES,
    *ANSWERING,
    *SERVING,
    *SCORING,
    *EXPORTING,
    *TRUST,
    *KEEPING,
    *SEEING,
    *SHARING,
)
