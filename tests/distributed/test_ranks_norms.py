"""The norm under every parallelism: each element once, the same bits on all ranks, in as few messages as promised."""

import math

import models
import pytest
import torch
import torch.distributed as dist
import worlds
from models import close, full, local, mesh_of, norm_of, on_mesh, plain, same_bits, sharded, whole, wholes_of
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import fastclip

pytestmark = pytest.mark.slow


def messages(function):
    """How many collectives it takes, counted from its second call on."""
    function()
    with CommDebugMode() as comm:
        function()
    return comm.get_total_counts()


def check(parameters, wholes=None, collectives=None, **options):
    """`total_norm` and `clip_norm_` of `parameters` against the whole gradients: `wholes`, or what DTensors say."""
    wholes = wholes_of(parameters) if wholes is None else wholes
    for p in models.NORMS:
        norm = fastclip.clip_norm_(parameters, math.inf, p, **options)
        assert type(norm) is torch.Tensor and norm.shape == () and norm.dtype == torch.float32
        assert close(norm, norm_of(wholes, p)), (p, norm, norm_of(wholes, p))
        same_bits(norm)
        if collectives is not None:
            most = collectives + (math.isinf(p))  # the maximum is a message of its own
            taken = messages(lambda p=p: fastclip.clip_norm_(parameters, math.inf, p, **options))
            assert taken <= most, (p, taken)
    limit = 0.5 * norm_of(wholes, 2.0)
    before = [None if p.grad is None else local(p.grad).clone() for p in parameters]
    norm = fastclip.clip_norm_(parameters, limit, **options)
    coef = limit / (norm.double().item() + 1e-6)
    for p, b in zip(parameters, before):
        if b is not None:
            torch.testing.assert_close(local(p.grad), (b.double() * coef).to(b.dtype), rtol=3e-7, atol=0)


# ---- 1, 2: FSDP2 and HSDP, uneven and empty shards ----


def _sharded_along(names, shape, placements):
    mesh = mesh_of(shape, names)
    check(on_mesh(mesh, placements=placements), collectives=1)
    grads = [p.grad for p in on_mesh(mesh, placements=placements)]
    assert close(fastclip.total_norm(grads), norm_of([full(g) for g in grads], 2.0))


@pytest.mark.parametrize("placements", [None, [Replicate()]], ids=str)
def test_one_dimension(placements):
    worlds.run(2, _sharded_along, ("dp",), (2,), placements)


def test_hybrid_sharding():
    worlds.run(4, _sharded_along, ("replicate", "shard"), (2, 2), [Replicate(), Shard(0)])


def _fully_shard():
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of((4,), ("dp",))
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(4, 5)).square().sum().backward()
    check(list(model.parameters()), collectives=1)


def test_fsdp2():
    worlds.run(4, _fully_shard)


# ---- 3, 4, 5: two dimensions, some parameters on one of them, and plain ones ----


def _two_dimensions(flatten):
    mesh = mesh_of((2, 2), ("dp", "tp"))
    if flatten:
        mesh._flatten("dp_tp")
    parameters = [
        *on_mesh(mesh, 0, [Shard(0), Shard(0)]),
        *on_mesh(mesh, 10, [Shard(0), Replicate()]),
        *on_mesh(mesh["dp"], 20),  # norms, which tensor parallelism leaves whole
        sharded(whole((4, 6), 30), mesh, [Shard(0), Shard(1)], whole((4, 6), 31)),
        plain(whole((3,), 40), whole((3,), 41)),
    ]
    check(parameters, collectives=1)  # the world's group has all of the mesh's ranks


@pytest.mark.parametrize("flatten", [False, True])
def test_norms_on_one_dimension_of_two(flatten):
    worlds.run(4, _two_dimensions, flatten)


def _disjoint_dimensions():
    mesh = mesh_of((2, 2), ("dp", "tp"))
    check([*on_mesh(mesh["dp"], 0), *on_mesh(mesh["tp"], 10)], collectives=1)


def test_some_on_one_dimension_and_some_on_the_other():
    worlds.run(4, _disjoint_dimensions)


def _part_of_a_world():
    """A 2 x 2 mesh on each half of eight ranks: two models in one world, and no group of four but the flattened one."""
    mesh = mesh_of((2, 2, 2), ("model", "dp", "tp"))["dp", "tp"]
    parameters = on_mesh(mesh, dist.get_rank() // 4, [Shard(0), Shard(0)])
    wholes = wholes_of(parameters)
    norm = fastclip.total_norm([p.grad for p in parameters])
    assert close(norm, norm_of(wholes, 2.0))
    count = messages(lambda: fastclip.clip_norm_(parameters, math.inf))
    clipper = fastclip.Clipper(parameters, 1.0)
    clipper.warm_up()
    return count, messages(clipper.clip_)


def test_several_models_in_one_world():
    """One message for each dimension of the mesh, and after ``warm_up()`` one for all."""
    assert worlds.run(8, _part_of_a_world) == [(2, 1)] * 8


# ---- 6, 7: experts ----


def _experts():
    dense = mesh_of((8,), ("fsdp",))
    expert = mesh_of((2, 4), ("efsdp", "ep"))
    parameters = [
        *on_mesh(dense, 0),
        sharded(whole((8, 6, 4), 50), expert, [Shard(1), Shard(0)], whole((8, 6, 4), 51)),
        sharded(whole((4, 3), 52), expert, [Replicate(), Shard(0)], whole((4, 3), 53)),
    ]
    check(parameters, collectives=1)


def test_experts_on_a_second_mesh():
    worlds.run(8, _experts)


def _plain_experts():
    mesh = mesh_of((2,), ("dp",))
    rank = dist.get_rank()
    expert = plain(whole((3, 2), 60), whole((3, 2), 70 + rank))
    parameters = [*on_mesh(mesh), expert]
    texts = models.raised(lambda: fastclip.clip_norm_(parameters, 1.0))
    assert all(f"parameters[{len(models.SHAPES)}]" in text and "mark_sharded" in text for text in texts), texts
    fastclip.distributed.mark_sharded(expert, dist.group.WORLD)
    wholes = [full(p.grad) for p in parameters[:-1]] + [whole((3, 2), 70), whole((3, 2), 71)]
    for p in (1.0, 2.0, 3.0, math.inf):
        assert close(fastclip.clip_norm_(parameters, math.inf, p), norm_of(wholes, p))


def test_plain_experts_are_refused_until_they_are_declared():
    worlds.run(2, _plain_experts)


# ---- 8, 9, 10: pipelines, tied embeddings, ranks without gradients ----


def _pipeline(frozen):
    stage = dist.get_rank()
    shapes = [(4, 3), (2,)] if stage == 0 else [(5,), (3, 3), (2, 2)]
    parameters = [plain(whole(s, 80 + 10 * stage + i), whole(s, 180 + 10 * stage + i)) for i, s in enumerate(shapes)]
    wholes = [whole(s, 180 + i) for i, s in enumerate([(4, 3), (2,)])]
    if frozen and stage == 1:
        for p in parameters:
            p.grad = None
    elif not frozen:
        wholes += [whole(s, 190 + i) for i, s in enumerate([(5,), (3, 3), (2, 2)])]
    check(parameters, wholes, collectives=1, process_group=dist.group.WORLD)


@pytest.mark.parametrize("frozen", [False, True])
def test_pipeline_stages(frozen):
    worlds.run(2, _pipeline, frozen)


def _pipeline_of_meshes():
    mesh = mesh_of((2, 2), ("pp", "dp"))
    stage = mesh.get_local_rank("pp")
    wholes = [whole(shape, 100 + 10 * stage + i) for stage in (0, 1) for i, shape in enumerate(models.SHAPES)]
    for group in (mesh.get_group("pp"), mesh["pp"]):
        parameters = on_mesh(mesh["dp"], 10 * stage)
        check(parameters, wholes, collectives=2, process_group=group)  # of order 0: over the mesh, then over the stages
    assert messages(lambda: fastclip.clip_norm_(parameters, 1.0, process_group=group)) == 1
    text = models.raised(lambda: fastclip.clip_norm_(parameters, 1.0, process_group=mesh.get_group("dp")))
    assert all("process_group must be of ranks that hold other parameters" in t for t in text)


def test_pipeline_stages_of_sharded_parameters():
    worlds.run(4, _pipeline_of_meshes)


def _tied_over_stages():
    stage = dist.get_rank()
    embedding = plain(whole((6, 2), 90), whole((6, 2), 91))
    own = plain(whole((3,), 92 + stage), whole((3,), 94 + stage))
    fastclip.distributed.mark_shared([embedding], dist.group.WORLD)
    wholes = [whole((6, 2), 91), whole((3,), 94), whole((3,), 95)]
    check([embedding, own], wholes, process_group=dist.group.WORLD)


def test_an_embedding_that_two_stages_hold_counts_once():
    worlds.run(2, _tied_over_stages)


def _some_without():
    mesh = mesh_of((2,), ("dp",))
    parameters = on_mesh(mesh)
    wholes = [full(p.grad) for p in parameters]
    if dist.get_rank() == 1:  # whose part of the first gradient then counts as zeros
        parameters[0].grad = None
    wholes[0] = wholes[0][:3]  # what rank 0 holds of five rows
    for p in models.NORMS:
        norm = fastclip.clip_norm_(parameters, math.inf, p)
        assert close(norm, norm_of(wholes, p)), p
        same_bits(norm)
    if dist.get_rank() == 1:
        for p in parameters:
            p.grad = None
    same_bits(fastclip.clip_norm_(parameters, 1.0))
    for p in parameters:
        p.grad = None
    assert fastclip.clip_norm_(parameters, 1.0) == 0


def test_a_rank_without_gradients_joins():
    worlds.run(2, _some_without)


# ---- 13: gradients yet to be summed ----


def _partial(operation):
    mesh = mesh_of((2, 2), ("dp", "tp"))
    rank = dist.get_rank()
    parameters = on_mesh(mesh, 0, [Shard(0), Replicate()])
    row, column = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
    for i, p in enumerate(parameters[:5]):
        local = whole(p._local_tensor.shape, 1000 + 10 * rank + i)
        placement = [Shard(0), Partial(operation)]
        p.grad = DTensor.from_local(local, mesh, placement, run_check=False, shape=p.shape, stride=p.stride())
    wholes = [full(p.grad) for p in parameters]
    assert row in (0, 1) and column in (0, 1)
    for p in models.NORMS:
        norm = fastclip.clip_norm_(parameters, math.inf, p)
        assert close(norm, norm_of(wholes, p)), (p, norm, norm_of(wholes, p))
        same_bits(norm)
    fastclip.clip_norm_(parameters, 0.5)
    assert close(norm_of([full(p.grad) for p in parameters], 2.0), 0.5, 1e-5)
    texts = models.raised(lambda: fastclip.clip_value_(parameters, 0.1))
    assert all("NotImplementedError" in text and "Partial" in text for text in texts)


@pytest.mark.parametrize("operation", ["sum", "avg"])
def test_partial_gradients_have_the_norm_of_their_sum(operation):
    worlds.run(4, _partial, operation)


# ---- what else a gradient may be ----


def _pending():
    """The result of a functional collective that nobody has waited for."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce

    p = plain(whole((4, 3), 0))
    p.grad = all_reduce(whole((4, 3), 1), "sum", dist.group.WORLD)
    assert isinstance(p.grad, AsyncCollectiveTensor)
    norm = fastclip.clip_norm_([p], 1.0)
    assert close(norm, 2 * norm_of([whole((4, 3), 1)], 2.0))
    assert close(norm_of([p.grad.trigger_wait()], 2.0), 1.0, 3e-6)


def test_a_pending_collective_is_waited_for():
    worlds.run(2, _pending)


def _tied():
    mesh = mesh_of((2,), ("dp",))
    parameters = on_mesh(mesh)
    wholes = [full(p.grad) for p in parameters]
    twin = torch.nn.Parameter(parameters[0].detach().clone())
    twin.grad = parameters[0].grad
    check([*parameters, twin], wholes)


def test_tied_gradients_count_once():
    worlds.run(2, _tied)


def _without_a_compiler():
    from fastclip.backends import packers

    packers.chosen = packers.Chosen("python", packers.PythonPacker(None), None, "there is no compiler")
    mesh = mesh_of((2, 2), ("dp", "tp"))
    check([*on_mesh(mesh, 0, [Shard(0), Replicate()]), plain(whole((3,), 40), whole((3,), 41))], collectives=1)
    with fastclip.use_backend("reference"):
        check(on_mesh(mesh["dp"], 20))


def test_without_the_native_packer():
    worlds.run(4, _without_a_compiler)


def _versions():
    mesh = mesh_of((2,), ("dp",))
    parameters = on_mesh(mesh)
    before = [p.grad._version for p in parameters]
    fastclip.clip_norm_(parameters, 0.1)
    assert all(p.grad._version > version for p, version in zip(parameters, before))


def test_autograd_is_told_of_the_wrapper_too():
    worlds.run(2, _versions)


def _dtypes(dtype):
    check_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    mesh = mesh_of((2,), ("dp",))
    parameters = on_mesh(mesh, dtype=dtype)
    norm = fastclip.clip_norm_(parameters, math.inf)
    assert norm.dtype == check_dtype
    assert close(norm, norm_of([full(p.grad) for p in parameters], 2.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    worlds.run(2, _dtypes, dtype)


def _compiled():
    mesh = mesh_of((2,), ("dp",))
    parameters = on_mesh(mesh)
    wholes = wholes_of(parameters)

    @torch.compile(backend="eager")
    def clip(limit):
        norm = fastclip.clip_norm_(parameters, limit)
        return norm + 1

    for limit in (1e3, 0.5, 0.25):
        norm = clip(limit) - 1
    assert close(norm, 0.5, 1e-5)
    assert close(clip(0.1) - 1, 0.25, 1e-5)
    assert wholes and close(fastclip.total_norm([p.grad for p in parameters]), 0.1, 1e-5)


def test_a_graph_break_under_torch_compile():
    worlds.run(2, _compiled)


def _experts_of_different_number():
    rank = dist.get_rank()
    experts = [plain(whole((2, i + 1), i), whole((2, i + 1), 10 * rank + i)) for i in range(2 + rank)]
    fastclip.distributed.mark_sharded(experts, dist.group.WORLD)
    wholes = [whole((2, i + 1), 10 * rank + i) for rank in range(2) for i in range(2 + rank)]
    for p in (1.0, 2.0, math.inf):
        assert close(fastclip.clip_norm_(experts, math.inf, p), norm_of(wholes, p))
    texts = models.raised(lambda: fastclip.clip_tensor_norm_(experts, 1.0))
    assert all("the ranks do not make the same call" in text for text in texts)


def test_ranks_may_have_more_or_fewer_declared_parts():
    worlds.run(2, _experts_of_different_number)


def _uneven_stages():
    """Stages of other meshes, of no parameters at all, and of another number of them in a second model."""
    mesh = mesh_of((2, 2), ("pp", "dp"))
    stage, group = mesh.get_local_rank("pp"), mesh.get_group("pp")
    own = on_mesh(mesh["dp"], 0) if stage else [plain(whole((3,), 1), whole((3,), 2))]
    wholes = [whole((3,), 2), *(whole(shape, 100 + i) for i, shape in enumerate(models.SHAPES))]
    for p in models.NORMS:
        for which in (group, mesh["pp"]):
            assert close(fastclip.clip_norm_(own, math.inf, p, process_group=which), norm_of(wholes, p)), p

    frozen = own if stage else []
    for p in models.NORMS:
        norm = fastclip.clip_norm_(frozen, math.inf, p, process_group=group)
        assert close(norm, norm_of(wholes[1:], p)), p
    clipper = fastclip.Clipper(frozen, 1e9, process_group=group)
    clipper.warm_up()
    assert close(clipper.clip_().total_norm, norm_of(wholes[1:], 2.0))

    for count in (3, 4):  # of which stage 0 sees one plan and stage 1 two
        number = count if stage else 3
        second = [plain(whole((2,), i), whole((2,), 10 * stage + i)) for i in range(number)]
        grads = [whole((2,), i) for i in range(3)] + [whole((2,), 10 + i) for i in range(count)]
        assert close(fastclip.clip_norm_(second, math.inf, process_group=group), norm_of(grads, 2.0))


def test_stages_that_differ():
    worlds.run(4, _uneven_stages)


def _marks_elsewhere():
    rank = dist.get_rank()
    embedding = plain(whole((6, 2), 90), whole((6, 2), 91))
    fastclip.distributed.mark_shared(embedding, dist.group.WORLD)
    assert close(fastclip.clip_norm_([embedding], math.inf), norm_of([whole((6, 2), 91)], 2.0))  # of this stage alone
    part = plain(whole((4,), 0), whole((4,), 1 + rank))
    fastclip.distributed.mark_sharded(part, dist.group.WORLD)
    exact = norm_of([whole((4,), 1), whole((4,), 2)], 2.0)
    clip = torch.compile(lambda: fastclip.clip_norm_([part], 1e9), backend="eager")
    assert close(clip(), exact)
    with CommDebugMode():  # a mode that looks, on all ranks or on one
        assert close(fastclip.clip_tensor_norm_([part], 1e9)[0], exact)
    mesh = mesh_of((2,), ("dp",))
    first, second = (sharded(whole((4,), i), mesh, [Shard(0)], whole((4,), 5 + i)) for i in range(2))
    exact = norm_of([whole((4,), 5), whole((4,), 6)], 2.0)
    assert close(fastclip.clip_norm_([first, {"params": [second]}], 1e9), exact)


def test_declarations_reach_every_path():
    worlds.run(2, _marks_elsewhere)
