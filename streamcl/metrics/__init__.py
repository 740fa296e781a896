"""How good the served answers were, measured before each label was learned (prequential).

- `prequential`: START HERE: what the worker holds; one per stream of outcomes
- `examples`: the columns that all of them read
- `binary`, `multiclass`, `regression`: the metrics of each task, over the whole stream and over the last N
- `tasks`: the same for each further task of a model of several
- `slices`: gAUC, and metrics for each value of a field, over the last N
- `lists`: NDCG, recall and MRR of the first k of what was shown together
- `losses`: log-loss, entropy, normalised entropy: the definitions, over arrays
- `ranking`: AUC, exact over arrays and in constant memory over a whole stream
- `calibration`: its error, by deciles of the scores, and the shift of all logits that would mend it
- `grouped`: AUC within groups
- `window`: the last N rows
- `continual`: what is kept and taken up from segment to segment: ACC, transfer, forgetting, min-ACC, the stability gap
- `recalibration`: forgetting that a new scale and bias would repair, and the rest
- `switching`: regret on a source that switches, against the known best

Every number is exported under the name of its definition; `_window` marks the last `metrics.window` examples,
`_decayed` all of them by a weight that halves every `metrics.half_life`.
"""

from streamcl.metrics.examples import Examples
from streamcl.metrics.lists import Lists
from streamcl.metrics.losses import log_loss, normalized_entropy
from streamcl.metrics.prequential import Prequential
from streamcl.metrics.ranking import exact_auc
from streamcl.metrics.slices import Slices
from streamcl.metrics.tasks import TaskMetrics

__all__ = ["Examples", "Lists", "Prequential", "Slices", "TaskMetrics", "exact_auc", "log_loss", "normalized_entropy"]
