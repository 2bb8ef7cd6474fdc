"""What ``plan.json`` says of a saved network. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcqp_prune.apply.probe_data import Probe
from qcqp_prune.errors import PlanError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.storage import StrPath, digest_of, read_json

SCHEMA_VERSION = 1
FORMAT = "qcqp-prune plan"
PLAN, WEIGHTS = "plan.json", "weights.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer of the smaller network.

    Attributes:
        name: its path, and its name in the weights file.
        aliases: further paths of the same (tied) tensor.
        shape, dtype: after cutting.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Plan:
    """What ``plan.json`` says.

    Attributes:
        graph, masks: enough to cut the dense network again.
        realisation: ``modules`` or ``graph``, see ``shrink_and_verify``.
        training: whether the network was in train mode.
        tensors: everything in the weights file.
        probes: outputs on inputs made from the graph, to tell another ``forward`` by.
        weights_sha256: of the weights file.
        library, torch: versions that wrote it.
    """

    graph: ChannelGraph
    masks: Masks
    realisation: str
    training: bool
    tensors: tuple[StoredTensor, ...]
    probes: tuple[Probe, ...]
    weights_sha256: str
    library: str
    torch: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``, with a checksum of all of it."""
        data = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "library": self.library,
            "torch": self.torch,
            "model": self.graph.model,
            "fingerprint": self.graph.fingerprint,
            "realisation": self.realisation,
            "training": self.training,
            "weights": {"file": WEIGHTS, "sha256": self.weights_sha256},
            "tensors": [asdict(t) for t in self.tensors],
            "probes": [p.to_json() for p in self.probes],
            "masks": self.masks.to_json(),
            "graph": self.graph.to_json(),
        }
        return {**data, "digest": digest_of(data)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_json``.

        Raises:
            PlanError: the data is no plan, of another schema, incomplete, or was changed after it was written.
        """
        if data.get("format") != FORMAT:
            raise PlanError("this is no plan of a pruned network: give a folder that save() wrote")
        if data.get("schema") != SCHEMA_VERSION:
            raise PlanError(
                f"the plan has schema {data.get('schema')} and was written by version {data.get('library')}; this "
                f"version reads {SCHEMA_VERSION}: install that version, or save the network again"
            )
        if data.get("digest") != digest_of({key: value for key, value in data.items() if key != "digest"}):
            raise PlanError(
                "the plan was changed after it was written, its checksum does not match: save the network again"
            )
        try:
            return cls(
                graph=ChannelGraph.from_json(data["graph"]),
                masks=Masks.from_json(data["masks"]),
                realisation=data["realisation"],
                training=data["training"],
                tensors=tuple(_stored(entry) for entry in data["tensors"]),
                probes=tuple(Probe.from_json(entry) for entry in data["probes"]),
                weights_sha256=data["weights"]["sha256"],
                library=data["library"],
                torch=data["torch"],
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"the plan is incomplete ({error!r}): save the network again") from error


def read_plan(folder: StrPath) -> Plan:
    """Read and check ``plan.json``, without the weights.

    Raises:
        PlanError: it is missing, corrupt, changed, or of another schema.
    """
    return Plan.from_json(read_json(Path(folder) / PLAN, "a plan in a folder that save() wrote"))


def _stored(entry: Mapping[str, Any]) -> StoredTensor:
    return StoredTensor(
        str(entry["name"]), tuple(entry["aliases"]), tuple(entry["shape"]), str(entry["dtype"])
    )
