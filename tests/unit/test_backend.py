import asyncio
import threading

from weft.server.backend import Changes


def test_change_in_another_thread_wakes_all_who_wait() -> None:
    async def scenario() -> list[int]:
        changes = Changes()
        waiting = [asyncio.create_task(changes.wait(0, 30)) for _ in range(100)]
        await asyncio.sleep(0)
        thread = threading.Thread(target=changes.notify)
        thread.start()
        found = await asyncio.gather(*waiting)
        thread.join()
        return found

    assert asyncio.run(scenario()) == [1] * 100


def test_change_between_reading_and_waiting_is_not_missed() -> None:
    async def scenario() -> int:
        changes = Changes()
        revision = changes.revision
        changes.notify()
        return await changes.wait(revision, 30)

    assert asyncio.run(scenario()) == 1


def test_wait_ends_with_its_time_and_leaves_nothing() -> None:
    changes = Changes()
    assert asyncio.run(changes.wait(0, 0.001)) == 0
    changes.notify()  # the loop is closed: nobody is woken, and nothing fails
    assert changes.revision == 1


def test_cancelled_wait_does_not_stop_the_others() -> None:
    async def scenario() -> int:
        changes = Changes()
        gone, stays = (asyncio.create_task(changes.wait(0, 30)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        changes.notify()
        return await stays

    assert asyncio.run(scenario()) == 1
