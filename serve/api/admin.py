"""The RPCs of `jaxrec.v1.ModelAdmin`: decode, call, encode."""

from serve.api.context import Context
from serve.api.errors import InvalidRequest
from serve.api.rules import check_id
from serve.pb import model_admin_pb2 as pb
from serve.pb import model_admin_pb2_grpc
from serve.serving.versions import SHARE_TOLERANCE, ModelLibrary, State

STATES = {state: pb.ModelState.Value(f"MODEL_STATE_{state.name}") for state in State}


class ModelAdminServicer(model_admin_pb2_grpc.ModelAdminServicer):
    """Manages the versions of one library."""

    def __init__(self, models: ModelLibrary) -> None:
        self._models = models

    def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        models = [
            pb.Model(
                model_version=report.model_version,
                folder=report.folder,
                state=STATES[report.state],
                reason=report.reason,
                traffic_share=report.traffic_share,
                loaded_time=report.loaded_time,
            )
            for report in self._models.report()
        ]
        return pb.ListModelsResponse(models=models, automatic_reload=self._models.automatic)

    def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        loaded = self._models.load(request.model_version) if request.model_version else self._models.load_newest()
        return pb.LoadModelResponse(model_version=self._models.versions()[0], loaded=loaded)

    def SetTraffic(self, request: pb.SetTrafficRequest, context: Context) -> pb.SetTrafficResponse:
        shares: dict[str, float] = {}
        for at, entry in enumerate(request.shares):
            field = f"shares[{at}].model_version"
            check_id(field, entry.model_version)
            if entry.model_version in shares:
                raise InvalidRequest(field, "different versions", f"{entry.model_version!r} twice")
            shares[entry.model_version] = entry.share
        if not 1 <= len(shares) <= 2:
            raise InvalidRequest("shares", "one or two versions", len(shares))
        if not all(0 < share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > SHARE_TOLERANCE:
            raise InvalidRequest("shares", "shares above 0 that add up to 1", list(shares.values()))
        self._models.set_traffic(shares)
        return pb.SetTrafficResponse(
            shares=[pb.TrafficShare(model_version=version, share=share) for version, share in self._models.shares()]
        )

    def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        return pb.RollBackResponse(model_version=self._models.roll_back())
