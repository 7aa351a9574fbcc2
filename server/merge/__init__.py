"""Merging: the updates of a round become the next version of a module.

Always in this order (the schema and finiteness of an update were checked before it got here):

1. **Measure.** One streaming pass over every update: norms, trim thresholds, mean Fisher (``statistics``).
2. **Clip.** Weights are bounded and normalised, every update is scaled to at most the median norm, so that no
   single worker can own the result, whatever the rule.
3. **Rule.** A coordinate-wise rule sees a *tile*, the same slice of every update stacked [W, T], and returns
   [T] (``rules``); a few see a tensor or a matrix whole instead (``whole``). LoRA under a linear rule, or one of
   matrices, is merged as ΔW = B A and recompressed to its rank (``lora``).
4. **Outer optimiser.** The merged movement becomes a step (``weft.server.outer``).

The same updates give the same bytes, whatever the order of arrival, the tile size and the number of threads:
updates are sorted, coordinate-wise sums run worker by worker in float64, whole-tensor sums use fixed blocks,
and linear algebra runs on one thread a matrix. Coordinate-wise results are the same on every machine; those
of ``lora = "exact"`` on machines with the same linear algebra library.

``settings`` and ``spaces`` need no torch, so that the coordinator can read a run file; the rules do.
"""
