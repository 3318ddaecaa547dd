"""Where and how a run happens: nothing here changes what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field

Switch = Parameter(negative="")

FailOn = Literal["low", "medium", "high", "never"]


class RunOptions(BaseModel):
    """Options that every verb takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: Path = Field(Path("runs"), description="Folder in which each run gets a directory.")
    store: str | None = Field(None, description="Artefacts: a folder or fsspec URL. [default: RUNS/store]")
    device: str = Field("auto", description="auto, cpu, cuda.")
    precision: str = Field("auto", description="Of training and attacks: auto, bf16, fp32.")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads. [default: OMP_NUM_THREADS, or one a core]"
    )
    checkpoint_every: float = Field(30.0, ge=0, description="Seconds between two checkpoints of a training.")
    fail_on: FailOn = Field("high", description="Exit 1 on a failed finding of at least this severity.")
    dry_run: Annotated[bool, Switch] = Field(False, description="Print the plan and what it costs; run nothing.")
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = Field(
        False, description="Print result.json instead of a summary."
    )
    allow_code: Annotated[bool, Switch] = Field(
        False, description="Accept module:factory from --config or from a run that is resumed."
    )

    @property
    def store_location(self) -> str:
        """The store that is used."""
        return self.store or str(self.runs / "store")
