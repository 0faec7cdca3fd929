"""What can be done to a session beside taking turns: fork it, rewind it, see what its cache hits were.

None of it reaches the engine: a fork's or a rewound session's next turn finds the shared prefix in the cache.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from agentserve.server.errors import BadRequest
from agentserve.server.generation import json_response, serving
from agentserve.server.schemas import ForkBody, RewindBody, read

router = APIRouter(prefix="/v1/sessions")


@router.post("/{session_id}/fork")
async def fork_session(request: Request, session_id: str) -> Response:
    """Open sessions that begin with this one's turns."""
    body = await read(request, ForkBody)
    store = serving(request).store
    try:
        forks = store.fork(session_id, body.count, body.at_turn)
    except ValueError as error:
        raise BadRequest(str(error), "at_turn") from None
    return json_response({"sessions": [fork.id for fork in forks]}, 201)


@router.post("/{session_id}/rewind")
async def rewind_session(request: Request, session_id: str) -> Response:
    """Take back a session's last turns."""
    body = await read(request, RewindBody)
    try:
        session = serving(request).store.rewind(session_id, body.to_turn)
    except ValueError as error:
        raise BadRequest(str(error), "to_turn") from None
    return json_response({"id": session.id, "turns": len(session.turns), "tokens": len(session.log)})


@router.get("/{session_id}/cache")
async def show_cache(request: Request, session_id: str) -> Response:
    """Where the tokens of each turn's prompt came from, and why they did not come from the cache."""
    for name in request.query_params:
        raise BadRequest(f"unknown query parameter {name!r}", name)
    session = serving(request).store.get(session_id)
    return json_response(
        {"id": session.id, "turns": [turn.cache() for turn in session.turns], "total": session.totals.cache()}
    )
