"""Many clients at once that ask, leave, repeat and ask too much: everyone gets an answer, and nothing stays behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import httpx

from tests.server.conftest import Running


async def client(server: Running, number: int, seen: Counter[str]) -> None:
    draw = random.Random(number)
    async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as http:
        session = (await http.post("/v1/sessions", json={"system": "Be kind."})).json()["id"]
        for _ in range(8):
            kind = draw.choice(["ask", "ask", "stream", "many", "turn", "turn", "leave", "leave turn", "bad", "delete"])
            prompt = [draw.randrange(3, 400) for _ in range(draw.randrange(1, 60))]
            body = {"prompt": prompt, "max_tokens": draw.randrange(1, 30), "seed": number, "return_token_ids": True}
            turn = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": draw.randrange(1, 20)}
            turns = f"/v1/sessions/{session}/turns"
            match kind:
                case "ask" | "many" | "stream":
                    body |= {"n": 3 if kind == "many" else 1, "stream": kind == "stream"}
                    reply = await http.post("/v1/completions", json=body)
                    if kind == "stream" and reply.status_code == 200:
                        assert reply.text.endswith("data: [DONE]\n\n")
                        assert '"finish_reason":"length"' in reply.text or '"code":"queue_full"' in reply.text
                    elif reply.status_code == 200:
                        assert [len(c["token_ids"]) for c in reply.json()["choices"]] == [body["max_tokens"]] * body[
                            "n"
                        ]
                case "turn":
                    reply = await http.post(turns, json=turn)
                case "leave" | "leave turn":
                    path, sent = ("/v1/completions", body | {"max_tokens": 1500}) if kind == "leave" else (turns, turn)
                    seconds = draw.random() * 0.05
                    try:
                        async with asyncio.timeout(seconds):
                            reply = await http.post(path, json=sent)
                    except TimeoutError:
                        seen["left"] += 1
                        continue
                case "bad":
                    reply = await http.post("/v1/completions", json=body | {"top_p": 7})
                case _:
                    reply = await http.delete(f"/v1/sessions/{session}")
            seen[f"{kind} {reply.status_code}"] += 1
            if kind == "bad":
                assert reply.status_code == 400
            elif kind.endswith("turn"):  # the turn before, which this client left, may not have ended yet
                assert reply.status_code in (200, 400, 409, 410, 429), reply.text
            elif kind == "delete":
                assert reply.status_code in (200, 410)
            else:
                assert reply.status_code in (200, 429), reply.text


async def test_everyone_gets_an_answer_and_nothing_stays(fake_server: Callable[..., Running]) -> None:
    server = fake_server(delay=0.002, max_running=4, max_waiting=6)
    seen: Counter[str] = Counter()
    async with asyncio.timeout(60):
        await asyncio.gather(*(client(server, number, seen) for number in range(24)))
    # how often each happens is the scheduler's and the clock's affair; that it happened is what makes this a test
    for kind in ("ask 200", "turn 200", "left", "bad 400"):
        assert seen[kind], f"no client saw {kind!r}"
    assert any(kind.endswith("429") for kind in seen), "the queue was never full"
    engine = server.parts.engine
    await asyncio.to_thread(server.until, lambda: engine.in_flight == 0)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
        stats = (await http.get("/v1/stats")).json()
        assert (stats["running"], stats["waiting"]) == (0, 0)
        sessions = (await http.get("/v1/sessions")).json()["data"]
        assert {session["status"] for session in sessions} <= {"open"}
        for session in sessions:
            log = (await http.get(f"/v1/sessions/{session['id']}?tokens=true")).json()
            sampled = sum(turn["completion"] for turn in log["turns"])
            assert sum(log["loss_mask"]) == sampled
            assert len(log["token_ids"]) == (
                log["turns"][-1]["prompt"] + log["turns"][-1]["completion"] if log["turns"] else 0
            )
