"""The vision transformer: DeiT's layers, a pass for each task, and no task changes another's."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from moeyard.moe.config.kinds import read_model
from moeyard.moe.image_batch import image_batch
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.table import build_model, outside_layers
from moeyard.moe.models.vit import from_patches, to_patches

from small_images import ROUTER, TASKS, VIT


def with_labels(**changes):
    tasks = [{**TASKS[0], "labels": ["left", "right"]}, *TASKS[1:]]
    return read_model({**VIT, "tasks": tasks, **changes})


def model(**changes):
    found = build_model(with_labels(**changes))
    initialize(found, seed=3)
    with torch.no_grad():  # norms and biases too
        generator = torch.Generator().manual_seed(1)
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return found.eval()


def pixels(count=3):
    return torch.rand(count, 1, 8, 12, generator=torch.Generator().manual_seed(5)) * 2 - 1


def hidden(vit, images, task):
    tasks_N = torch.full((len(images),), task)
    with torch.no_grad():
        return vit(image_batch(images, tasks_N, vit.config.num_rows)).hidden_TD


def test_patches_are_cut_from_left_to_right_and_put_back():
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12)
    patches = to_patches(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].flatten())
    assert torch.equal(from_patches(patches, 4, (2, 3)), images)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_forward_is_the_formula_of_deit(class_token):
    vit = model(class_token=class_token, moe=None)
    images = pixels()
    convolution = vit.embed_patches.weight.view(16, 1, 4, 4)
    x = F.conv2d(images, convolution, vit.embed_patches.bias, stride=4).flatten(2).transpose(1, 2)
    if class_token:
        x = torch.cat([vit.embed_class.weight.expand(3, 1, 16), x], dim=1)
    x = x + vit.embed_positions.weight
    for layer in vit.layers:
        own = layer.self_attn
        q, k, v = (p(layer.attention_norm(x)) for p in (own.q_proj, own.k_proj, own.v_proj))
        heads = [t.unflatten(2, (2, 8)).transpose(1, 2) for t in (q, k, v)]
        scores = (heads[0] @ heads[1].transpose(2, 3) / 8**0.5).softmax(dim=-1)
        x = x + own.o_proj((scores @ heads[2]).transpose(1, 2).flatten(2))
        mlp = layer.mlp
        x = x + mlp.down_proj(F.gelu(mlp.up_proj(layer.mlp_norm(x))))
    x = vit.norm(x)
    found = hidden(vit, images, 0)
    torch.testing.assert_close(found, x.flatten(0, 1), rtol=1e-5, atol=1e-5)
    read = x[:, 0] if class_token else x.mean(dim=1)
    expected = read @ vit.head_side.weight.T + vit.head_side.bias
    torch.testing.assert_close(
        vit.answer(found, vit.config.tasks[0]), expected, rtol=1e-5, atol=1e-5
    )
    first = x[:, 1] if class_token else x[:, 0]  # the patch at the top left
    corner = (first @ vit.head_parts.weight.T + vit.head_parts.bias).view(3, 3, 4, 4)
    parts = vit.answer(found, vit.config.tasks[1])
    assert parts.shape == (3, 3, 8, 12)
    torch.testing.assert_close(parts[:, :, :4, :4], corner, rtol=1e-5, atol=1e-5)


def test_experts_are_in_every_other_layer_unless_the_configuration_says_otherwise():
    assert with_labels(num_layers=5).dense_layers == (0, 2, 4)
    assert with_labels(num_layers=4, dense_layers=[3]).moe_layers == [0, 1, 2]
    assert with_labels(num_layers=1).moe_layers == [0]
    assert with_labels(num_layers=3, moe=None).moe_layers == []


@pytest.mark.parametrize("form", ["gates", "vector"])
def test_a_task_chooses_its_own_experts(form):
    vit = model(moe={**VIT["moe"], "router": {**ROUTER, "form": form}})
    first, second = (hidden(vit, pixels(), task) for task in (0, 1))
    assert not torch.equal(first, second)


def test_gates_of_one_task_do_not_change_anothers_answers():
    vit, images = model(), pixels()
    before = [hidden(vit, images, task) for task in range(3)]
    ((_, layer),) = vit.moe_layers()
    with torch.no_grad():
        layer.gate.weight[1] *= -1
    after = [hidden(vit, images, task) for task in range(3)]
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])


def test_an_image_is_computed_alike_whatever_else_is_in_the_batch():
    vit, images = model(), pixels(5)
    tasks = torch.tensor([0, 2, 1, 2, 0])
    with torch.no_grad():
        mixed = vit(image_batch(images, tasks, vit.config.num_rows)).hidden_TD.unflatten(0, (5, -1))
    for number, task in enumerate(tasks.tolist()):
        alone = hidden(vit, images[number : number + 1], task)
        torch.testing.assert_close(mixed[number], alone, rtol=1e-5, atol=1e-6)


def test_what_is_outside_the_layers_is_what_the_model_has_there():
    vit = model()
    outside = {n: p.shape for n, p in vit.named_parameters() if not n.startswith("layers.")}
    assert {name: tensor.shape for name, tensor in outside_layers(vit.config)} == outside


def test_heads_of_other_tasks_begin_anew():
    stored = with_labels()
    more = [*stored.model_dump()["tasks"], {"name": "depth", "kind": "pixel_values"}]
    more[0]["labels"] = ["left", "middle", "right"]
    more[2]["loss_weight"] = 9.0
    moe = {**VIT["moe"], "router": {**ROUTER, "num_tasks": 4}}
    wanted = read_model({**VIT, "tasks": more, "moe": moe})
    heads = {name.partition(".")[0] for name in wanted.fresh_tensors(stored)}
    assert heads == {"head_side", "head_depth"}
    assert with_labels().architecture() == stored.architecture()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": [8, 13]}, r"image_size is \[8, 13\], which patches of 4 do not fill"),
        ({"num_heads": 3}, "d_model is 16, which does not split into 3 heads"),
        ({"tasks": [TASKS[1], TASKS[1]]}, "tasks has two of the name 'parts'"),
        ({"tasks": TASKS[:2]}, "num_tasks is 3, but tasks has 2; set it to 2"),
        ({"tasks": []}, "at least 1 item"),
        ({"tasks": [{"name": "A b", "kind": "classes"}]}, "should match pattern"),
        ({"moe": {**VIT["moe"], "router": {"kind": "hash"}}}, "reads token ids, and images have"),
        ({"dense_layers": [2]}, "dense_layers names layer 2, but there are 2"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        read_model({**VIT, **changes})
