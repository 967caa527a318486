"""AdamW with bf16 moments and fp32 master weights (report §3.3.3, §4.2), for machines without a fused kernel.

The class has the interface that Megatron's distributed optimizer expects of Transformer Engine's
`FusedAdam`: the same constructor, state keys (`exp_avg`, `exp_avg_sq`, `master_param`), `step` kept per
parameter group, and a state dict whose tensors are fp32 whatever their stored type. States therefore
interchange with TE, and between moment types.

The update is elementwise plain PyTorch, one tensor at a time. PyTorch's own fused CPU kernel is faster, but
its result for an element depends on the element's position in the tensor (vector body or tail); two copies
of a parameter that lie at different offsets of their shards, such as the embeddings of the main model and
of MTP, would drift apart.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor

__all__ = ["AdamW"]

_MOMENT_DTYPES = (torch.float32, torch.bfloat16)


class AdamW(torch.optim.Optimizer):
    """AdamW whose moments may be stored in bf16 while all arithmetic is fp32.

    One step, with m, v read from storage as fp32 and t counted from 1:

        p ← p (1 − lr·wd);  m ← β1 m + (1−β1) g;  v ← β2 v + (1−β2) g²
        p ← p − lr/(1−β1ᵗ) · m / (√v / √(1−β2ᵗ) + eps)

    The update uses m and v before they are rounded (to nearest even) for storage, as TE's kernel does.
    Operations and their order are those of `torch.optim.AdamW`, so with fp32 moments the two are bit-equal.

    Args:
        params: parameters or parameter groups, fp32 or bf16, any shape.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. DeepSeek-V3: β = (0.9, 0.95), weight decay
            0.1; its eps is unpublished, Megatron's `--adam-eps` (1e-8) is kept.
        bias_correction: divide the moments by 1 − βᵗ.
        adam_w_mode: decoupled weight decay; False adds `weight_decay · p` to the gradient.
        master_weights: keep an fp32 copy `master_param` of each parameter and write its rounding to the
            parameter.
        exp_avg_dtype, exp_avg_sq_dtype: storage type of the moments, fp32 or bf16.
        use_decoupled_grad: read `param.decoupled_grad` (any floating type) in place of `param.grad`.
        master_weight_dtype, store_param_remainders, capturable: part of TE's interface; only their defaults
            exist here.

    Raises:
        ValueError: an unsupported type or mode; the message names the Megatron argument.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        for option, dtype in (("--exp-avg-dtype", exp_avg_dtype), ("--exp-avg-sq-dtype", exp_avg_sq_dtype)):
            if dtype not in _MOMENT_DTYPES:
                raise ValueError(f"{option} is {dtype}: without Transformer Engine use fp32 or bf16")
        if master_weights and master_weight_dtype != torch.float32:
            raise ValueError(
                f"--main-params-dtype is {master_weight_dtype}: without Transformer Engine use fp32"
            )
        if master_weights and store_param_remainders:
            raise ValueError(
                "OptimizerConfig.store_param_remainders is True: 16-bit remainders in place of fp32 master "
                "weights are not supported; set it to False"
            )
        if capturable:
            raise ValueError(
                "--optimizer-cuda-graph is set: it needs the fused AdamW of Transformer Engine; leave it out"
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self.name_to_dtype_map = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Groups that are empty on this rank count too: ranks share the checkpoint's step.
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                if grad is not None:
                    self._update(param, grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One parameter's step, in fp32, with a single rounding of each stored tensor at the end."""
        if not self.state[param]:
            self.initialize_state(param)
        state = self.state[param]
        lr, (beta1, beta2), step = group["lr"], group["betas"], group["step"]
        correction1, correction2 = (
            (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        )

        weight = state["master_param"] if self.master_weights else param
        grad, m, v = (
            grad.to(weight.dtype),
            state["exp_avg"].to(weight.dtype),
            state["exp_avg_sq"].to(weight.dtype),
        )
        if group["weight_decay"] != 0:
            if self.adam_w_mode:
                weight.mul_(1 - lr * group["weight_decay"])
            else:
                grad = grad.add(weight, alpha=group["weight_decay"])
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = v.sqrt().div_(correction2**0.5).add_(group["eps"])
        weight.addcdiv_(m, denominator, value=-lr / correction1)

        for name, value in (("exp_avg", m), ("exp_avg_sq", v)):
            if value is not state[name]:
                state[name].copy_(value)
        if weight is not param:
            param.copy_(weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients that `step` reads."""
        if not self.use_decoupled_grad:
            super().zero_grad(set_to_none)
            return
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            grad = getattr(param, "decoupled_grad", None)
            if set_to_none:
                param.decoupled_grad = None
            elif grad is not None:
                grad.zero_()

    def initialize_state(self, param: Tensor, store_param_remainders: bool = False) -> None:
        """Zero moments and, with `master_weights`, an fp32 copy of the parameter."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=self.name_to_dtype_map[name])
        if self.master_weights:
            self.set_scaled_state(param, "master_param", param.detach())

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """State tensor `state_name` of the parameter as fp32 (a copy unless it is stored so)."""
        return self.state[param][state_name].float()

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Copy a floating tensor of the parameter's shape into the state, rounding to its stored type."""
        state = self.state[param]
        if state_name not in state:
            state[state_name] = torch.empty_like(param, dtype=self.name_to_dtype_map[state_name])
        if not unscaled_state.is_floating_point():
            raise ValueError(
                f"{state_name} to load has type {unscaled_state.dtype}: the checkpoint holds remainders "
                "in place of fp32 master weights; save it with store_param_remainders=False"
            )
        state[state_name].copy_(unscaled_state)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with every state tensor in fp32."""
        state_dict = super().state_dict()
        for index, param in enumerate(chain.from_iterable(group["params"] for group in self.param_groups)):
            if index in state_dict["state"]:
                names = state_dict["state"][index]
                state_dict["state"][index] = {name: self.get_unscaled_state(param, name) for name in names}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and states; the states are converted to this optimizer's types.

        The base class would convert them to each parameter's type, and so round the master weights to bf16.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name in self.name_to_dtype_map and value is not None:
                    self.set_scaled_state(param, name, value)
