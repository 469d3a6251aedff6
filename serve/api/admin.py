"""The RPCs of `jaxrec.v1.ModelAdmin`: decode, call, encode."""

from functools import partial

from serve.api.context import Context
from serve.api.errors import InvalidRequest, Violations
from serve.api.outcomes import OutcomesReport, decode_outcomes
from serve.api.pages import (
    DEFAULT_PAGE_SIZE,
    checked_page_size,
    decode_model_page_token,
    fitting_count,
    model_page_token,
)
from serve.api.rules import check_id
from serve.api.service import check_wanted
from serve.pb import model_admin_pb2 as pb
from serve.pb import model_admin_pb2_grpc
from serve.serving.errors import shown
from serve.serving.versions import SHARE_TOLERANCE, ModelLibrary, State
from serve.stores.base import EventStore

LONGEST_REASON = 1_000
STATES = {state: pb.ModelState.Value(f"MODEL_STATE_{state.name}") for state in State}


class ModelAdminServicer(model_admin_pb2_grpc.ModelAdminServicer):
    """Manages the versions of one library."""

    def __init__(self, models: ModelLibrary, store: EventStore) -> None:
        self._models = models
        self._outcomes = OutcomesReport(store)

    def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        found = Violations()
        size = found.check(checked_page_size, "page_size", request.page_size) or DEFAULT_PAGE_SIZE
        before = found.check(decode_model_page_token, "page_token", request.page_token)
        found.raise_any()
        reports = [one for one in self._models.report() if before is None or (one.model_version, one.folder) < before]
        models = [
            pb.Model(
                model_version=report.model_version,
                folder=report.folder,
                state=STATES[report.state],
                reason=report.reason[:LONGEST_REASON],
                traffic_share=report.traffic_share,
                loaded_time=report.loaded_time,
            )
            for report in reports[:size]
        ]
        fitting = fitting_count(models)
        last = models[fitting - 1] if fitting < len(reports) else None
        return pb.ListModelsResponse(
            models=models[:fitting],
            automatic_reload=self._models.automatic,
            next_page_token="" if last is None else model_page_token(last.model_version, last.folder),
        )

    def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        loaded = self._models.load(request.model_version) if request.model_version else self._models.load_newest()
        return pb.LoadModelResponse(model_version=self._models.versions()[0], loaded=loaded)

    def SetTraffic(self, request: pb.SetTrafficRequest, context: Context) -> pb.SetTrafficResponse:
        shares: dict[str, float] = {}
        if not 1 <= len(request.shares) <= 2:
            raise InvalidRequest("shares", "one or two versions", len(request.shares))
        found = Violations()
        for at, entry in enumerate(request.shares):
            field = f"shares[{at}].model_version"
            found.check(check_id, field, entry.model_version)
            if entry.model_version in shares:
                found.add(field, "different versions", f"{shown(entry.model_version)} twice")
            shares[entry.model_version] = entry.share
        found.raise_any()
        if not all(0 < share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > SHARE_TOLERANCE:
            raise InvalidRequest("shares", "shares above 0 that add up to 1", list(shares.values()))
        self._models.set_traffic(shares)
        return pb.SetTrafficResponse(
            shares=[pb.TrafficShare(model_version=version, share=share) for version, share in self._models.shares()]
        )

    def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        return pb.RollBackResponse(model_version=self._models.roll_back())

    def GetOutcomes(self, request: pb.GetOutcomesRequest, context: Context) -> pb.GetOutcomesResponse:
        def is_cancelled() -> bool:
            return not context.is_active()

        return self._outcomes.get(decode_outcomes(request), partial(check_wanted, context.time_remaining, is_cancelled))
