"""A worker that does not train: the client's own calls around a training that takes no time.

    python benchmarks/lib/idle_worker.py ADDRESS TOKEN DIRECTORY

Joins, works until the run is finished, and prints a line of JSON for each task: seconds by phase.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from weft.client.home import KEY, Access
from weft.client.join import connect, greet, register
from weft.client.transport import Transport
from weft.common.codec import CodecKind, CodecSettings, encode_update
from weft.common.identity.token import JoinToken
from weft.common.ids import WorkerId
from weft.common.manifest import Signed, canonical_json
from weft.common.modules import Schema
from weft.common.protocol import Stage, Task
from weft.common.settings import to_table
from weft.common.statements import UPDATE_TYPE, UpdateOfModule, UpdateStatement
from weft.common.tensors import read_header

PHASES = ("fetch", "encode", "upload", "submit", "wait")
"""``wait`` is from a receipt, or from the join, to the next task."""
IDLE_S = 120.0


def work(address: str, token_text: str, directory: Path) -> None:
    """Join, do tasks until the run is finished, and print the seconds of each phase as a line of JSON a task."""
    token = JoinToken.parse(token_text)
    ca_pem = greet(address, token, insecure=False, now=datetime.now(UTC))
    member = register(directory, address, token, ca_pem=ca_pem, name=directory.name, device="does not train")
    access = Access(member=member, key_file=directory / KEY)
    worker = IdleWorker(access, directory)
    with connect(access) as transport:
        asked_s = time.perf_counter()
        while not (answer := transport.poll_task(wait_s=20.0)).finished:
            if answer.task is not None:
                waited_s = time.perf_counter() - asked_s
                print(json.dumps(worker.do(transport, answer.task) | {"wait": waited_s}), flush=True)
                asked_s = time.perf_counter()


class IdleWorker:
    """The steps of a worker around a training that takes no time."""

    def __init__(self, access: Access, directory: Path) -> None:
        self._key, self._worker_id = access.key(), WorkerId(access.member.worker_id)
        self._directory = directory
        self._rng = np.random.default_rng(int.from_bytes(self._key.public[:8], "big"))
        self._deltas: dict[str, Any] = {}

    def do(self, transport: Transport, task: Task) -> dict[str, float]:
        """One task; returns the seconds of its phases."""
        begin_s = time.perf_counter()
        (start,) = task.modules
        self._report(transport, task, Stage.FETCHING)
        version = transport.download(
            start.blake3, self._directory / start.blake3, idle_s=IDLE_S, size_bytes=start.size_bytes
        )
        fetched_s = time.perf_counter()
        self._report(transport, task, Stage.ENCODING)
        update = self._encode(Schema(tuple(sorted(read_header(version).specs))))
        encoded_s = time.perf_counter()
        self._report(transport, task, Stage.SENDING)
        blob = transport.upload(update, task.lease_token, idle_s=IDLE_S)
        sent_s = time.perf_counter()
        said = UpdateOfModule(
            module=start.module, start_version=start.version, digest=blob.blake3, size_bytes=blob.size_bytes
        )
        transport.submit_update(lease_token=task.lease_token, statement=self._statement(task, said))
        version.unlink()
        moments = [begin_s, fetched_s, encoded_s, sent_s, time.perf_counter()]
        seconds = [end - begin for begin, end in itertools.pairwise(moments)]
        return dict(zip(PHASES, seconds, strict=False)) | {"update_bytes": blob.size_bytes}

    def _report(self, transport: Transport, task: Task, stage: Stage) -> None:
        transport.report_progress(lease_token=task.lease_token, stage=stage, num_done=0, num_total=1)

    def _encode(self, schema: Schema) -> Path:
        """An update that no other worker and no other round has."""
        if not self._deltas:
            self._deltas = {
                spec.name: self._rng.standard_normal(spec.shape, np.float32) for spec in schema.tensors
            }
        for array in self._deltas.values():
            array *= np.float32(0.99)
        path = self._directory / "update"
        encode_update(path, schema, self._deltas, CodecSettings(kind=CodecKind.FP32))
        return path

    def _statement(self, task: Task, update: UpdateOfModule) -> Signed:
        statement = UpdateStatement(
            run=task.run_id,
            task=task.task_id,
            worker=self._worker_id,
            epoch=task.lease_epoch,
            recipe=task.recipe_blake3,
            updates=(update,),
            num_steps=1,
            num_tokens=8,
            loss_first=1.0,
            loss_last=1.0,
        )
        return Signed.sign(self._key, UPDATE_TYPE, canonical_json(to_table(statement)))


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
