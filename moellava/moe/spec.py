# SPDX-License-Identifier: Apache-2.0
"""What a sparse model is: the options of upcycling and routing, as one dataclass that config.json keeps.

An option stands here once: its field says name, default, help, range and choices, and flags follow from that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moellava.errors import UserError
from moellava.moe.flags import Range, check_option, check_options, fixed_option, option, optional_flags
from moellava.registry import Registry

FORMAT = 1
"""Version of the `moe` section of config.json. Published MoE-LLaVA sections have none."""

MODES: Registry = Registry("moe_mode")
MODES.register("first_half", lambda n_layers: range(n_layers // 2))
MODES.register("second_half", lambda n_layers: range(n_layers // 2, n_layers))
MODES.register("sparse", lambda n_layers: range(0, n_layers, 2))
MODES.register("dense", lambda n_layers: range(n_layers))

CUSTOM = "custom"
"""The `moe_mode` of layers that are given by index."""

MODES.register(CUSTOM, lambda n_layers: ())

PRESETS: Registry = Registry("moe_preset")
PRESETS.register(
    "today",
    {
        "capacity_factor": 1.0,
        "drop_tokens": False,
        "second_expert": "top",
        "top1_gate": "exact",
        "router_balance": "sequence",
        "aux_over_layers": "mean",
    },
)
PRESETS.register(
    "moe-llava",
    {
        "capacity_factor": 1.5,
        "drop_tokens": True,
        "second_expert": "sampled",
        "top1_gate": "probability",
        "router_balance": "first_choice",
        "aux_over_layers": "sum",
    },
)
"""name -> the values it gives to fields that the user left at their default."""

READ_WITH = {
    "init_noise": ("init", "noise"),
    "init_drop_ratio": ("init", "drop"),
    "router_bias_rate": ("router_balance", "bias"),
}
"""Option -> the other option, and its value, without which nothing reads it."""

COUNT, FRACTION, NOT_NEGATIVE = Range(least=1), Range(least=0, most=1), Range(least=0)


@dataclass
class MoESpec:
    """Options of a sparse model. Each field is a flag of `train.py` and of `moellava upcycle` (`moe/flags.py`).

    Raises:
        UserError: a value that is out of range or unknown, or two that contradict each other.
    """

    moe_mode: str = fixed_option(
        "second_half",
        "Which decoder layers become sparse: one half, every second one (sparse: 0, 2, 4 …), all of them (dense), or "
        "those of --moe_layers_idx (custom).",
        choices=MODES,
    )
    moe_layers_idx: list[int] | None = fixed_option(None, "Decoder layers by index, from 0, instead of --moe_mode.")
    num_experts: list[int] = fixed_option(
        [4], "Experts of each sparse layer: one number for all of them, or one per sparse layer.", COUNT
    )
    top_k_experts: int = option(2, "Experts that each token visits.", COUNT)
    drop_tokens: bool = option(
        False,
        "True: an expert takes at most its capacity of tokens, which a capacity factor alone also means. "
        "False: every token reaches all its experts.",
    )
    capacity_factor: float = option(
        1.0,
        "Tokens that an expert takes in training, as a multiple of the even share k × tokens / experts.",
        Range(above=0),
    )
    eval_capacity_factor: float = option(2.0, "The same in evaluation.", Range(above=0))
    min_capacity: int = option(0, "Tokens that an expert may always take, whatever the factor says.", NOT_NEGATIVE)
    use_residual: bool = fixed_option(
        False,
        "Residual MoE: the dense MLP stays, and is mixed with the experts' output by two learned coefficients that sum "
        "to 1 (arXiv:2201.05596).",
    )
    init: str = fixed_option(
        "copy", "How experts start (docs/MOE.md).", choices=("copy", "noise", "drop", "granular", "shared")
    )
    init_noise: float = fixed_option(
        0.01,
        "--init noise: standard deviation of what is added, as a fraction of each weight matrix's own.",
        NOT_NEGATIVE,
    )
    init_drop_ratio: float = fixed_option(
        0.1, "--init drop: fraction of the intermediate units of each expert that is drawn anew.", FRACTION
    )
    granularity: int = fixed_option(
        1,
        "--init granular: slices that each MLP is cut into; --num_experts and --top_k_experts are multiples of it.",
        COUNT,
    )
    init_seed: int = fixed_option(0, "Seed of the routers and of whatever an init draws; the same on every rank.")
    router_aux_loss_coef: float = option(0.01, "Weight of the balancing loss.", NOT_NEGATIVE)
    router_z_loss_coef: float = option(0.0, "Weight of the z-loss (arXiv:2202.08906, eq. 5).", NOT_NEGATIVE)
    router_balance: str = option(
        "sequence",
        "Which balancing acts: a loss over each sequence, over the batch, over first choices (the original's), the "
        "loss-free bias (arXiv:2408.15664), or none.",
        choices=("sequence", "batch", "first_choice", "bias", "none"),
    )
    router_bias_rate: float = option(
        1e-3,
        "--router_balance bias: step of the bias after each optimizer step, in units of a router probability.",
        NOT_NEGATIVE,
    )
    router_jitter: float = option(
        0.0,
        "Noise in training: the router's input is multiplied by factors from [1 - jitter, 1 + jitter].",
        Range(least=0, below=1),
    )
    freeze_router: bool = option(False, "Routers (and residual coefficients) keep the values they start with.")
    second_expert: str = option(
        "top",
        "top: the k best. sampled: with k = 2 the second is drawn with Gumbel noise in training, as the original does.",
        choices=("top", "sampled"),
    )
    top1_gate: str = option(
        "exact",
        "With k = 1: exact scales the output by p / stop_gradient(p) = 1; probability by p, as the original does.",
        choices=("exact", "probability"),
    )
    aux_over_layers: str = option(
        "mean", "How the losses of the layers are pooled; the original takes the sum.", choices=("mean", "sum")
    )

    def __post_init__(self) -> None:
        if isinstance(self.num_experts, int):
            self.num_experts = [self.num_experts]
        if self.moe_layers_idx is not None:
            self.moe_mode = CUSTOM
        elif self.moe_mode == CUSTOM:
            raise UserError("--moe_mode custom needs --moe_layers_idx with the indices of the layers to convert.")
        check_options(self)
        if self.top_k_experts > min(self.num_experts):
            raise UserError(
                f"--top_k_experts {self.top_k_experts} does not fit --num_experts {self.num_experts}: "
                "choose between 1 and the smallest number of experts."
            )
        if self.second_expert == "sampled" and self.top_k_experts != 2:
            raise UserError(f"--second_expert sampled needs --top_k_experts 2, not {self.top_k_experts}.")
        if self.init == "granular":
            self._check_granular()
        elif self.granularity != 1:
            raise UserError(f"--granularity {self.granularity} needs --init granular, but --init is {self.init}.")

    def _check_granular(self) -> None:
        for count in self.num_experts:
            if count % self.granularity:
                raise UserError(
                    f"--num_experts {count} is not a multiple of --granularity {self.granularity}: "
                    "experts are whole sets of slices."
                )
        if self.top_k_experts % self.granularity:
            raise UserError(
                f"--top_k_experts {self.top_k_experts} is not a multiple of --granularity {self.granularity}: "
                "a token must visit whole sets of slices, or the conversion is not exact."
            )

    def layers_of(self, n_layers: int) -> dict[int, int]:
        """Which layers of a decoder become sparse, and their number of experts, in order.

        Args:
            n_layers: decoder layers of the dense model.
        """
        chosen = self.moe_layers_idx if self.moe_layers_idx is not None else list(MODES[self.moe_mode](n_layers))
        if len(set(chosen)) != len(chosen) or not all(0 <= index < n_layers for index in chosen):
            raise UserError(f"--moe_layers_idx {chosen}: indices must differ and lie in 0 … {n_layers - 1}.")
        counts = self.num_experts * len(chosen) if len(self.num_experts) == 1 else self.num_experts
        if len(counts) != len(chosen):
            raise UserError(
                f"--num_experts has {len(counts)} values, but {len(chosen)} layers become sparse ({chosen}): "
                "give one number, or one per sparse layer."
            )
        return dict(sorted(zip(chosen, counts, strict=True)))

    def changed(self, **values: Any) -> MoESpec:
        """What a sparse model goes on with when it is trained further.

        Args:
            values: options that are given anew.

        Raises:
            UserError: one that says how the layers were made, and differs; or leaving the bias, which chooses.
        """
        is_fixed = {item.name: item.metadata["is_fixed"] for item in fields(self)}
        for name, value in values.items():
            own = getattr(self, name)
            if is_fixed[name] and not _equal(value, own):
                raise UserError(
                    f"--{name} {value}, but the folder's layers were made with {own}. Leave the flag out to train them "
                    "further."
                )
        anew = {name: value for name, value in values.items() if not is_fixed[name]}
        spec = replace(self, **anew).refuse_idle(anew)
        if self.router_balance == "bias" != spec.router_balance:
            raise UserError(
                f"--router_balance {spec.router_balance}, but the folder's routers choose experts by a bias that they "
                "have learnt with --router_balance bias. Leave the flag out."
            )
        return spec

    def refuse_idle(self, given: Iterable[str]) -> MoESpec:
        """Itself. Raises UserError for an option that is given and that nothing would read."""
        for name in READ_WITH.keys() & set(given):
            other, value = READ_WITH[name]
            if getattr(self, other) != value:
                raise UserError(
                    f"--{name} {getattr(self, name)} needs --{other} {value}, but --{other} is {getattr(self, other)}."
                )
        return self

    def is_exact(self) -> bool:
        """Whether the recipe keeps the dense model's output, in theory (docs/MOE.md, 'Exactness')."""
        if self.drop_tokens:
            return False
        if self.init in ("noise", "drop"):
            return self.init_noise == 0 if self.init == "noise" else self.init_drop_ratio == 0
        return self.init == "shared" or self.top_k_experts > 1 or self.top1_gate == "exact"

    def to_config(self) -> dict[str, Any]:
        """The `moe` section of config.json."""
        return {"format": FORMAT, "moe_enable": True, **asdict(self)}

    @classmethod
    def from_config(cls, section: dict[str, Any]) -> MoESpec:
        """Reads a `moe` section, ours or that of a published MoE-LLaVA folder.

        A published section has no `format`; its routing and loss are the original's (preset `moe-llava`).
        """
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in section.items() if key in known and value is not None}
        if "format" in section:
            return cls(**values)
        preset = {**PRESETS["moe-llava"]}
        if values.get("top_k_experts", 2) != 2:
            preset["second_expert"] = "top"
        return cls(**{**preset, **values})

    @classmethod
    def from_preset(cls, preset: str, **values: Any) -> MoESpec:
        """A preset's values, then those that are given. Raises UserError for one that nothing would read."""
        return cls(**{**PRESETS[preset], **values}).refuse_idle(values)


def _equal(value: Any, other: Any) -> bool:
    """Whether two values say the same; one number stands for a list of it."""
    if isinstance(value, list) and isinstance(other, list) and 1 in (len(value), len(other)):
        return set(value) == set(other)
    return value == other


MoESpecFlags = optional_flags(MoESpec, "options of the sparse model")
"""The flags of a command that makes or trains a sparse model."""


def given_options(flags: Any) -> dict[str, Any]:
    """The options that the user gave, by name. A capacity factor alone means that experts drop what exceeds it.

    Args:
        flags: what has the fields of `MoESpecFlags`: the parsed flags of a command.

    Raises:
        UserError: a value that is out of range or unknown.
    """
    given = {item.name: value for item in fields(MoESpec) if (value := getattr(flags, item.name)) is not None}
    for item in fields(MoESpec):
        if item.name in given:
            check_option(item, given[item.name])
    if "capacity_factor" in given or "eval_capacity_factor" in given:
        given.setdefault("drop_tokens", True)
    return given
