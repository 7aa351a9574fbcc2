"""An evaluation task: how good a path's versions are on documents of the path that are never learnt."""

from __future__ import annotations

from typing import Final

from weft.client.data import sequences_of
from weft.client.loop import Event
from weft.client.tasks.inhand import concerns_path
from weft.client.tasks.steps import Steps
from weft.common.composition import Composed
from weft.common.errors import OutOfMemory
from weft.common.evaluation import Evaluation, evaluate
from weft.common.protocol import Stage
from weft.common.sequences import Sequences
from weft.common.statements import UpdateStatement

SEQUENCES_MAX: Final = 1024
"""An evaluation looks at this many at most, evenly spaced: its error is then a few per cent of a nat."""
_BATCH_SIZE: Final = 8


class EvaluationSteps(Steps):
    """Compose the versions, and evaluate the held-out part of the path's documents."""

    _sequences: Sequences | None = None
    _evaluation: Evaluation | None = None

    def load(self) -> Event | None:
        """Also read what is held out."""
        super().load()
        documents = self.shop.documents_of(self.run, self.sources, self.hand)
        tokenizer = self.shop.resident_of(self.run).tokenizer
        with concerns_path():
            found = sequences_of(
                documents.heldout(),
                tokenizer,
                self.run.recipe,
                heldout=True,
                on_tokenised=self.hand.on_tokenised,
            )
        self._sequences = found.spread(SEQUENCES_MAX)
        return None

    def perform(self) -> Event | None:
        """Compute the loss, in smaller batches where memory is short."""
        assert self._sequences is not None  # noqa: S101 - loaded before
        if not len(self._sequences):
            return None
        composed = self.shop.resident_of(self.run).compose(self.run.recipe, self.start, rank=self.task.rank)
        self._evaluation = self._evaluate(composed, self._sequences)
        return None

    def _evaluate(self, composed: Composed, sequences: Sequences) -> Evaluation:
        batch_size = _BATCH_SIZE
        while True:
            try:
                return evaluate(
                    composed, sequences, batch_size=batch_size, on_progress=self.hand.follow(Stage.TRAINING)
                )
            except OutOfMemory:
                if batch_size == 1:
                    raise
            batch_size //= 2

    def statement(self) -> UpdateStatement:
        """The loss and the number of labels that it is the mean of; neither when nothing is held out."""
        task, evaluation = self.task, self._evaluation
        return UpdateStatement(
            run=task.run_id,
            task=task.task_id,
            worker=self.shop.me.worker_id,
            epoch=task.lease_epoch,
            recipe=task.recipe_blake3,
            validation_loss=evaluation.loss if evaluation else None,
            validation_labels=int(evaluation.num_labels.sum()) if evaluation else 0,
        )

    def accepted(self) -> None:
        """Say it."""
        if self._evaluation is None:
            self.shop.say(
                f"path {self.task.path} of {self.task.run_id}: nothing is held out to evaluate it on"
            )
            return
        self.shop.say(
            f"path {self.task.path} of {self.task.run_id} evaluated: loss {self._evaluation.loss:.4f} "
            f"on {int(self._evaluation.num_labels.sum()):,} held-out labels"
        )
