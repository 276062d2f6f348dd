"""train.optimizer of run.toml: which one, and its constants."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from thinwire.tomlfile import Section

EIGHT_BIT = "adamw 8bit"


class AdamW(Section):
    """Loshchilov & Hutter 2019."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    states: Literal["full", "8bit"] = "full"
    """How moments are kept: "full" in the dtype of the parameters; "8bit" in blocks of 8 bits (Dettmers et al.
    2022), for more operations a step."""


class Muon(Section):
    """Momentum orthonormalised for matrices (Jordan et al. 2024), AdamW for embeddings and vectors."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)


class SignSGD(Section):
    """Each value moves by the learning rate, in the direction of its gradient's sign (Bernstein et al. 2018); for DeMo."""

    kind: Literal["signsgd"] = "signsgd"
    weight_decay: float = Field(0.0, ge=0)


class SGD(Section):
    """With momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)


def _adamw_unless_named(value: Any) -> Any:
    return {"kind": "adamw", **value} if isinstance(value, dict) else value


Optimizer = Annotated[AdamW | SGD | SignSGD | Muon, Field(discriminator="kind"), BeforeValidator(_adamw_unless_named)]


def state_of(optimizer: Optimizer) -> str:
    """What is kept of each parameter, as `Workload.optimizer_bytes` knows it."""
    return EIGHT_BIT if isinstance(optimizer, AdamW) and optimizer.states == "8bit" else optimizer.kind
