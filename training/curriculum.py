"""The Modality Pyramid: which task each step trains (arXiv 2510.27571, section on the curriculum).

At the start of every epoch a prober gives each task k a score R_k, the mean cosine of N_p of its positive pairs. The
epoch's tasks are drawn with P(k) proportional to exp(R_k / sigma), and sigma rises linearly over the epochs from 0.1
to 1.0: well-aligned tasks first, all tasks nearly alike at the end. The other schedules exist to be compared with it:
`reversed` draws P(k) proportional to exp(-R_k / sigma), hard tasks first; `uniform` draws every task alike;
`proportional` by the task's number of pairs n_k; `temperature` by n_k to the power of `sampling_alpha`; `difficulty`
by D_k, the share of its loss that a task has still to lose, measured on the probe's pairs; `progress` by how much of
D_k the last epoch took away, all alike in the first. A mean cosine says how near a task's two modalities lie in the
prober's space; D_k says whether one pair is told from another, and its fall whether the task can be learnt at all.

Everything here is a function of the settings, the seed and the R_k, so that all ranks draw the same task and a resumed
run draws what the uninterrupted one would have drawn.
"""

import zlib
from dataclasses import asdict, dataclass, field

import numpy as np
from scipy.special import logsumexp


SCHEDULES = ("pyramid", "reversed", "uniform", "proportional", "temperature", "difficulty", "progress")
# Not in the paper: added to every D_k, or its fall, by the schedules that go by them, so that no task is forgotten.
LEAST_WEIGHT = 0.02


def sigma_at(epoch, epochs, sigma_min=0.1, sigma_max=1.0):
    """Temperature of the scheduler in an epoch, linear from `sigma_min` in the first to `sigma_max` in the last.

    Args:
        epoch (`int`): from 0.
        epochs (`int`): how many there are; with one epoch sigma is `sigma_min`.
        sigma_min, sigma_max (`float`): > 0, dimensionless.

    Returns:
        `float`: sigma.

    Raises:
        ValueError: the epoch does not exist.
    """
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch must be from 0 to {epochs - 1}, got {epoch}")
    return sigma_min + (sigma_max - sigma_min) * epoch / max(epochs - 1, 1)


def task_probabilities(relevance, sigma):
    """P(k) proportional to exp(R_k / sigma).

    Args:
        relevance (sequence of `float`): R_k of each task, a mean cosine.
        sigma (`float`): > 0.

    Returns:
        `np.ndarray` of shape `(K,)`, float64, sums to 1.

    Raises:
        ValueError: sigma is not positive, or a score is not finite.
    """
    scores = np.asarray(relevance, dtype=np.float64)
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    if not np.isfinite(scores).all():
        raise ValueError(f"every task needs a finite relevance score, got {scores.tolist()}")
    weights = np.exp((scores - scores.max()) / sigma)
    return weights / weights.sum()


def size_probabilities(sizes, alpha):
    """P(k) proportional to n_k ** alpha: 1 draws in proportion to size, 0 draws all alike.

    Args:
        sizes (sequence of `int`): pairs of each task, > 0.
        alpha (`float`): from 0 to 1.

    Returns:
        `np.ndarray` of shape `(K,)`, float64, sums to 1.
    """
    weights = np.asarray(sizes, dtype=np.float64) ** alpha
    return weights / weights.sum()


def probe_difficulty(similarities, same, temperature):
    """D_k: the probe's symmetric InfoNCE over what random embeddings would have. Not in the paper.

    Args:
        similarities (`np.ndarray` of shape `(n, n)`): cosines of the probe's queries with its targets.
        same (`np.ndarray` of shape `(n, n)`, bool): pairs of one content or source, whose targets are no negatives.
        temperature (`float`): of the loss.

    Returns:
        `float`: 0 where every pair is told from the others, 1 at chance, more if worse; 0 for a single pair.
    """
    count = len(similarities)
    if count < 2:
        return 0.0
    logits = np.asarray(similarities, dtype=np.float64) / temperature
    positives = logits.diagonal()
    logits = np.where(same & ~np.eye(count, dtype=bool), -np.inf, logits)
    losses = [logsumexp(logits, axis=axis) - positives for axis in (0, 1)]
    return float(np.mean(losses) / np.log(count))


def probe_sample(task, size, count, seed):
    """Rows of a task that the prober scores: `min(count, size)` different ones, sorted, drawn once for all epochs.

    # Not in the paper: one sample for all epochs, so that R_k changes through the weights alone.
    """
    generator = np.random.default_rng([seed, zlib.crc32(task.encode()), 1])
    return sorted(generator.choice(size, size=min(count, size), replace=False).tolist())


@dataclass
class EpochPlan:
    """What the curriculum decided for an epoch, as it is logged and kept in a checkpoint.

    Attributes:
        epoch (`int`): from 0.
        sigma (`float`): the scheduler's temperature.
        relevance (`dict[str, float]`): R_k by task.
        probabilities (`dict[str, float]`): P(k) by task.
        difficulty (`dict[str, float]`): D_k by task, see [`probe_difficulty`].
    """

    epoch: int
    sigma: float
    relevance: dict
    probabilities: dict
    difficulty: dict = field(default_factory=dict)


class Curriculum:
    """Plans epochs and draws one task a step.

    Args:
        tasks (`list[str]`): their order is part of the draw.
        epochs, steps_per_epoch (`int`): length of the run.
        schedule (`str`, defaults to `"pyramid"`): one of `SCHEDULES`.
        sigma_min, sigma_max (`float`): see [`sigma_at`].
        seed (`int`): the same seed and R_k give the same draws.
        sizes (`dict[str, int]`, *optional*): pairs of each task, for the schedules that go by size.
        sampling_alpha (`float`, defaults to 0.5): exponent of the `temperature` schedule.
        upsampling (`dict[str, float]`, *optional*): factors on the unnormalised P(k) of some tasks, in any schedule.
    """

    def __init__(
        self,
        tasks,
        epochs,
        steps_per_epoch,
        schedule="pyramid",
        sigma_min=0.1,
        sigma_max=1.0,
        seed=42,
        sizes=None,
        sampling_alpha=0.5,
        upsampling=None,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if schedule in ("proportional", "temperature") and sizes is None:
            raise ValueError(f"schedule {schedule} needs sizes, the number of pairs of each task")
        self.sizes, self.sampling_alpha, self.upsampling = sizes, sampling_alpha, upsampling or {}
        self.tasks = list(tasks)
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.schedule, self.sigma_min, self.sigma_max, self.seed = schedule, sigma_min, sigma_max, seed
        self.history = []

    def start_epoch(self, epoch, relevance, difficulty=None):
        """Fix an epoch's probabilities from the prober's scores.

        Args:
            epoch (`int`): from 0; epochs start in order.
            relevance (`dict[str, float]`): R_k of every task.
            difficulty (`dict[str, float]`, *optional*): D_k of every task; `difficulty` and `progress` need it.

        Returns:
            [`EpochPlan`], also appended to `history`.
        """
        if epoch != len(self.history):
            raise ValueError(f"epoch {len(self.history)} starts next, got {epoch}")
        sigma = sigma_at(epoch, self.epochs, self.sigma_min, self.sigma_max)
        scores = [relevance[task] for task in self.tasks]
        difficulty = difficulty or {}
        probabilities = self._probabilities(scores, sigma, difficulty)
        if self.upsampling:
            probabilities = probabilities * [self.upsampling.get(task, 1.0) for task in self.tasks]
            probabilities /= probabilities.sum()
        plan = EpochPlan(
            epoch,
            sigma,
            {task: float(score) for task, score in zip(self.tasks, scores)},
            {task: float(p) for task, p in zip(self.tasks, probabilities)},
            {task: float(difficulty[task]) for task in self.tasks if task in difficulty},
        )
        self.history.append(plan)
        return plan

    def _probabilities(self, scores, sigma, difficulty):
        if self.schedule == "pyramid":
            return task_probabilities(scores, sigma)
        if self.schedule == "reversed":
            return task_probabilities([-score for score in scores], sigma)
        if self.schedule == "uniform" or (self.schedule == "progress" and not self.history):
            return np.full(len(self.tasks), 1 / len(self.tasks))
        if self.schedule in ("difficulty", "progress"):
            weights = np.array([difficulty[task] for task in self.tasks])
            if self.schedule == "progress":
                weights = [self.history[-1].difficulty[task] for task in self.tasks] - weights
            weights = weights.clip(min=0) + LEAST_WEIGHT
            return weights / weights.sum()
        alpha = 1.0 if self.schedule == "proportional" else self.sampling_alpha
        return size_probabilities([self.sizes[task] for task in self.tasks], alpha)

    def draws(self, epoch):
        """The tasks of a started epoch, one a step, drawn from its probabilities by a generator of its own."""
        probabilities = np.array([self.history[epoch].probabilities[task] for task in self.tasks])
        generator = np.random.default_rng([self.seed, epoch])
        chosen = generator.choice(len(self.tasks), size=self.steps_per_epoch, p=probabilities / probabilities.sum())
        return [self.tasks[index] for index in chosen]

    def state_dict(self):
        return {"history": [asdict(plan) for plan in self.history]}

    def load_state_dict(self, state):
        self.history = [EpochPlan(**plan) for plan in state["history"]]
