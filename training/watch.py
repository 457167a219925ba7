"""Early warning of a run that goes wrong, while there is time to stop it."""

from collections import deque


# Not in the paper, all of them: where trouble begins is a matter of experience.
COLLAPSED_RELEVANCE = 0.98  # mean cosine of queries with all candidates, near 1 when all embeddings are one
WAITING_SHARE = 0.3  # of the time of the last steps
WINDOW_STEPS = 50
EXPECTED_DRAWS = 1.0


class Watch:
    """Looks at every step and tells each kind of trouble once.

    Args:
        report (`Callable`): called with a kind and a sentence; kinds are `"collapse"`, `"never drawn"`, `"loader"`.
        told (iterable of `str`): kinds that were told before this run was resumed.
        window_steps (`int`): steps over which trouble has to last.

    Attributes:
        told (`set`): kinds so far.
    """

    def __init__(self, report, told=(), window_steps=WINDOW_STEPS):
        self._report = report
        self.told = set(told)
        self._relevance, self._waited, self._seconds = (deque(maxlen=window_steps) for _ in range(3))

    def epoch(self, plan, draws):
        """Warn of tasks that an epoch will hardly draw, or by chance does not.

        Args:
            plan ([`EpochPlan`]): the epoch's.
            draws (`list[str]`): the task of each of its steps.
        """
        steps, shares = len(draws), plan.probabilities
        rare = [task for task in shares if shares[task] * steps < EXPECTED_DRAWS or task not in draws]
        if rare:
            self._tell(
                f"never drawn in epoch {plan.epoch + 1}",
                f"epoch {plan.epoch + 1} will hardly draw {', '.join(rare)}: about one step of {steps} each, or none; "
                "raise sigma_min, task_upsampling or steps_per_epoch",
            )

    def step(self, relevance, waited, seconds):
        """Take note of a step.

        Args:
            relevance (`float`): mean cosine of queries and candidates.
            waited (`float`): seconds until the loader had the batch.
            seconds (`float`): of the whole step, the waiting included.
        """
        for values, value in ((self._relevance, relevance), (self._waited, waited), (self._seconds, seconds)):
            values.append(value)
        if len(self._relevance) < self._relevance.maxlen:
            return
        if min(self._relevance) > COLLAPSED_RELEVANCE:
            self._tell(
                "collapse",
                f"embeddings have collapsed: for {len(self._relevance)} steps queries and candidates had a mean "
                f"cosine above {COLLAPSED_RELEVANCE}; lower learning_rate, or set mask_margin to null",
            )
        share = sum(self._waited) / max(sum(self._seconds), 1e-9)
        if share > WAITING_SHARE:
            self._tell("loader", f"{share:.0%} of the time is spent waiting for data: raise loader_workers")

    def _tell(self, kind, sentence):
        if kind not in self.told:
            self.told.add(kind)
            self._report(kind, sentence)
