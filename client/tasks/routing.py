"""A routing task: where the run's router sends this worker's documents; only counts leave the machine."""

from __future__ import annotations

from weft.client.documents import holdings_of
from weft.client.loop import Event
from weft.client.tasks.steps import Steps
from weft.common.protocol import Stage
from weft.common.statements import Holding, UpdateStatement


class RoutingSteps(Steps):
    """Route all documents and count."""

    _holdings: tuple[Holding, ...] = ()

    def perform(self) -> Event | None:
        """Route what was not routed before by this router, then count what each path would learn from."""
        run, hand = self.run, self.hand
        routes = self.shop.routes_of(run, self.sources, hand, Stage.TRAINING)
        follow, num_routed = hand.follow(Stage.TRAINING), len(routes)
        self._holdings = holdings_of(
            self.shop.own_data(run),
            routes,
            run.recipe,
            self.shop.resident_of(run).tokenizer,
            lambda num_documents: follow(num_routed + num_documents, 2 * num_routed),
        )
        return None

    def statement(self) -> UpdateStatement:
        """What each path got."""
        task = self.task
        return UpdateStatement(
            run=task.run_id,
            task=task.task_id,
            worker=self.shop.me.worker_id,
            epoch=task.lease_epoch,
            recipe=task.recipe_blake3,
            holdings=self._holdings,
        )

    def accepted(self) -> None:
        """Say it."""
        served = [holding.path for holding in self._holdings if holding.num_sequences]
        num_documents = sum(holding.num_documents for holding in self._holdings)
        self.shop.say(
            f"documents of {self.task.run_id} routed: {num_documents:,} for {len(self._holdings)} paths, "
            f"enough to train {', '.join(served[:12]) or 'none'}{' …' if len(served) > 12 else ''}"
        )
