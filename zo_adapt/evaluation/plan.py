"""What was found out about how a run is evaluated, for the log and for the user."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """How probes are evaluated, and why not faster.

    Args:
        candidates: Most points evaluated in one forward so far; 1: one at a time.
        layers: Frozen layers that run once for each example; 0: all run every time.
        nbytes: Bytes that their kept activations take.
        captured: Whether evaluations are replayed from CUDA graphs, once a shape has recurred.
        graphs: CUDA graphs that were captured so far.
        why_not: Why a faster way is not gone, by its name: "joint", "factors" (no weight is written
            along directions of low rank), "trunk", "graphs"; one that is gone, may still be or is
            not meant is missing. "repeats": how the values of quantised weights differ when the
            same probe is asked again; missing where they do not.
        ranks: Processes that share the evaluations.

    Example:
        >>> print(Plan(8, 4, 2**20, why_not={"graphs": "the view is not on a GPU"}))
        8 candidates a forward; trunk of 4 layers reused, 1 MB; graphs: the view is not on a GPU
    """

    candidates: int = 1
    layers: int = 0
    nbytes: int = 0
    captured: bool = False
    graphs: int = 0
    why_not: dict[str, str] = field(default_factory=dict)
    ranks: int = 1

    def __str__(self) -> str:
        parts = []
        if self.candidates > 1:
            parts.append(f"{self.candidates} candidates a forward")
        elif "joint" in self.why_not:
            parts.append(f"one candidate a forward: {self.why_not['joint']}")
        if "factors" in self.why_not:
            parts.append(f"weights made for each point: {self.why_not['factors']}")
        if self.layers:
            parts.append(f"trunk of {self.layers} layers reused, {self.nbytes / 2**20:.0f} MB")
        elif "trunk" in self.why_not:
            parts.append(f"no trunk reused: {self.why_not['trunk']}")
        if self.captured:
            parts.append("evaluations replayed from CUDA graphs")
        elif "graphs" in self.why_not:
            parts.append(f"graphs: {self.why_not['graphs']}")
        if "repeats" in self.why_not:
            parts.append(self.why_not["repeats"])
        if self.ranks > 1:
            parts.append(f"shared by {self.ranks} processes")
        return "; ".join(parts)
