"""Every detector in every format finds what it finds eagerly, and what cannot be exported is said in a line."""

from __future__ import annotations

import builtins
import importlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden
import numpy as np
import pytest
import tiny
import torch
from exporting import NAMES, SIZE, SIZES, agree, build, exported, in_all_formats
from PIL import Image
from test_detrex import model_of

from detr_family.errors import UserError
from detr_family.export import export_model
from detr_family.export.exporting import SUFFIX
from detr_family.inference import Predictor
from detr_family.inference import exported as exported_module
from detr_family.inference.exported import ExportedDetector
from detr_family.layers.deformable_attention import ms_deform_attn
from detr_family.modeling.set_detector import SetDetector


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[SetDetector, Path]:
    """DETR in the format that is written fastest."""
    return exported("DETR", "torchscript", tmp_path_factory.mktemp("script"))


def test_torchscript_of_detr(script: tuple[SetDetector, Path]) -> None:
    agree(*script, [(64, 80), (16, 48)], [1, 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny.DETECTORS if name != "DETR"])
def test_torchscript(name: str, tmp_path: Path) -> None:
    model, path = exported(name, "torchscript", tmp_path)
    agree(model, path, [(64, 80), (16, 48)], [1, 3])


@pytest.mark.parametrize("name", list(tiny.DETECTORS))
def test_all_formats(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    for _, path in in_all_formats(model, tmp_path, monkeypatch):
        agree(model, path, SIZES, [1, 3])


@pytest.mark.slow
def test_with_the_operator_where_it_is_built(tmp_path: Path) -> None:
    model, path = exported("DINO", "torch_export", tmp_path)
    agree(model, path, SIZES, [1, 3])


@pytest.mark.slow
@pytest.mark.golden
def test_dino_r50_with_golden_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("dino_r50_4scale", "MODEL.DETR.NUM_QUERIES", "100")
    golden.fill(model, golden.load("dino_r50_4scale"), tmp_path / "weights.pth").eval()
    images = [x["image"] for x in golden.batch()]
    # Also at 120 rows, of which a padded image fills 105: where its tokens end, runtimes used to differ.
    for _ in in_all_formats(model, tmp_path, monkeypatch, least=500, size=(128, 160), images=images):
        pass


@pytest.mark.slow
def test_tensorrts_plugin_in_place_of_grid_samples(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
    reference = importlib.import_module("onnx.reference")
    pytest.importorskip("onnxscript", reason="the onnxscript package is not installed")

    class MultiscaleDeformableAttnPlugin_TRT(importlib.import_module("onnx.reference.op_run").OpRun):
        op_domain = "trt.plugins"

        def _run(self, *inputs: Any, plugin_version: str, plugin_namespace: str) -> tuple[Any]:
            value, shapes, starts, locations, weights = map(torch.from_numpy, inputs)
            assert shapes.dtype == starts.dtype == torch.int32 and (plugin_version, plugin_namespace) == ("1", "")
            found = ms_deform_attn(value, shapes.long(), starts.long(), locations, weights)
            return (found.unflatten(-1, (value.shape[2], -1)).numpy(),)

    model, path = build("DINO"), tmp_path / "model.onnx"
    assert export_model(model, "onnx", path, size=SIZE, batch=2, tensorrt_plugin=True) is None
    graph = onnx.load(path)
    nodes = [node for node in graph.graph.node if node.domain == "trt.plugins"]
    assert len(nodes) == 3 and all(len(node.input) == 5 for node in nodes)  # one encoder layer and two of the decoder
    assert not [node for node in graph.graph.node if node.op_type == "GridSample"]
    image = tiny.image(64, 80, 0, seed=1)["image"]
    evaluator = reference.ReferenceEvaluator(graph, new_ops=[MultiscaleDeformableAttnPlugin_TRT])
    given = {"images": image[None].numpy(), "sizes": np.zeros((1, 2), np.int64)}
    boxes, scores, _ = (torch.from_numpy(x) for x in evaluator.run(None, given))
    with torch.no_grad():
        expected = model([{"image": image}])[0]["instances"]
    assert torch.allclose(scores[0], expected.scores, atol=1e-4)
    assert torch.allclose(boxes[0], expected.pred_boxes.tensor, atol=1e-2)
    with pytest.raises(UserError, match="a DETR has no deformable attention"):
        export_model(tiny.build("DETR"), "onnx", path, size=SIZE, tensorrt_plugin=True)
    with pytest.raises(UserError, match="is a node of an ONNX file"):
        export_model(tiny.build("DETR"), "torchscript", tmp_path / "a.ts", tensorrt_plugin=True)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino", "torch_export"])
@pytest.mark.parametrize("name", ["DETR", "DINO"])
def test_a_fixed_size(name: str, format: str, tmp_path: Path) -> None:
    _, path = exported(name, format, tmp_path, dynamic=False)
    assert ExportedDetector(path).about["size"] == list(SIZE)
    if format == "onnx":  # what follows from sizes is no longer computed
        _, other = exported(name, format, tmp_path / "open")
        fixed, dynamic = (len(importlib.import_module("onnx").load(x).graph.node) for x in (path, other))
        assert fixed < dynamic


@pytest.mark.slow
def test_weights_of_sixteen_bits(tmp_path: Path) -> None:
    full, half = tmp_path / "full.xml", tmp_path / "half.xml"
    pytest.importorskip("openvino")
    for path, precision in ((full, "float32"), (half, "float16")):
        assert export_model(build("DETR"), "openvino", path, size=SIZE, precision=precision) is not None
    assert half.with_suffix(".bin").stat().st_size < 0.7 * full.with_suffix(".bin").stat().st_size


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    model, path = exported("DINO", "aoti", tmp_path)
    agree(model, path, [(64, 80)], [1, 3])


def test_a_fixed_size_takes_fewer_images_and_on_request_others_stretched(tmp_path: Path) -> None:
    _, path = exported("DETR", "torchscript", tmp_path, dynamic=False)
    detector = ExportedDetector(path)
    image = tiny.image(*SIZE, 0, seed=1)["image"]
    alone, again = (detector([{"image": image}])[0]["instances"], detector([{"image": image}] * 3)[2]["instances"])
    assert torch.allclose(alone.scores, again.scores, atol=1e-6) and alone.image_size == SIZE
    twice = torch.nn.functional.interpolate(image[None].float(), scale_factor=2.0)[0].byte()
    with pytest.raises(UserError, match=r"an image of 192x224 is not of the only size that model\.ts takes, 96x112"):
        detector([{"image": twice}])
    larger = ExportedDetector(path, stretch=True)([{"image": twice}])[0]["instances"]
    assert larger.image_size == (192, 224)
    seen = torch.nn.functional.interpolate(twice[None].float(), SIZE, mode="bilinear", antialias=True)[0]
    seen = detector([{"image": seen.round().byte()}])[0]["instances"]
    assert torch.allclose(larger.pred_boxes.tensor, 2 * seen.pred_boxes.tensor, atol=1e-3)


def test_a_predictor_takes_a_file_in_place_of_a_checkpoint(script: tuple[SetDetector, Path], tmp_path: Path) -> None:
    model, path = script
    cfg = tiny.cfg_of("DETR")
    eager = Predictor(model, class_names=NAMES)
    for predictor in (Predictor.from_exported(path), Predictor.from_config(cfg, path)):
        assert predictor.class_names == NAMES
        predictor.resize = eager.resize
        array = tiny.image(50, 60, 0, seed=4)["image"].permute(1, 2, 0).numpy()
        file = tmp_path / "image.png"
        Image.fromarray(array).save(file)
        for source in (array, file):
            expected, found = eager(source), predictor(source)
            assert torch.allclose(expected.scores, found.scores, atol=1e-4)
            assert predictor.names(found) == eager.names(expected)


def test_of_several_files_the_fastest_is_taken(
    script: tuple[SetDetector, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow, fast, other = (tmp_path / name for name in ("slow.ts", "fast.ts", "other.onnx"))
    for path in (slow, fast):
        shutil.copy(script[1], path)
    other.write_bytes(b"nothing")
    clock = [0.0]

    def timed(detector: ExportedDetector, images: list[dict[str, Any]]) -> None:
        assert images[0]["image"].shape == (3, 800, 1066)  # Predictor's size
        clock[0] += 0.5 if detector.path == slow else 0.25

    monkeypatch.setattr(ExportedDetector, "forward", timed)
    monkeypatch.setattr(exported_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    with caplog.at_level("INFO", "detr_family"):
        model: Any = Predictor.from_exported([slow, other, fast]).model
    assert model.path == fast
    assert "other.onnx" in caplog.messages[0]
    assert caplog.messages[1] == "An image takes slow.ts 0.500 s, fast.ts 0.250 s: fast.ts is used"
    assert clock == [3.0]  # once to warm up and three times
    assert Predictor.from_exported([slow]).model.path == slow and clock == [3.0]
    monkeypatch.undo()
    renamed = exported("DETR", "torchscript", tmp_path, class_names=["x", "y", "z"])[1]
    with pytest.raises(UserError, match="are no forms of one detector: class_names differs"):
        Predictor.from_exported([fast, renamed])
    with pytest.raises(UserError, match=r"other\.onnx"):
        Predictor.from_exported([other])


def test_channels_in_the_order_of_the_training(tmp_path: Path) -> None:
    model, path = exported("DETR", "torchscript", tmp_path, input_format="BGR")
    bgr = tiny.image(64, 80, 0, seed=2)["image"]
    expected = model([{"image": bgr}])[0]["instances"]
    found = ExportedDetector(path, input_format="BGR")([{"image": bgr}])[0]["instances"]
    rgb = ExportedDetector(path)([{"image": bgr.flip(0)}])[0]["instances"]
    assert torch.allclose(expected.scores, found.scores, atol=1e-4)
    assert torch.equal(found.scores, rgb.scores)


@pytest.mark.slow
def test_onnxruntime_alone_takes_images_without_sizes(tmp_path: Path) -> None:
    model, path = exported("DETR", "onnx", tmp_path)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path))
    image = tiny.image(*SIZE, 0, seed=1)["image"]
    boxes, scores, labels = session.run(None, {"images": image[None].repeat(2, 1, 1, 1).numpy()})
    expected = model([{"image": image}])[0]["instances"]
    assert torch.allclose(expected.scores, torch.from_numpy(scores[1]), atol=1e-4)
    assert torch.allclose(expected.pred_boxes.tensor, torch.from_numpy(boxes[1]), atol=1e-2)
    assert labels.dtype == "int64" and session.get_modelmeta().custom_metadata_map["class_names"] == str(NAMES).replace(
        "'", '"'
    )


def test_a_file_that_differs_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import detr_family.export.exporting as exporting

    def broken(graph: torch.nn.Module, *args: Any) -> None:
        with torch.no_grad():
            next(p for k, p in graph.named_parameters() if "class_embed" in k).mul_(1.2)
        write(graph, *args)

    write = exporting.write_torchscript
    monkeypatch.setattr(exporting, "write_torchscript", broken)
    with pytest.raises(UserError, match="was removed: it differs from the detector by"):
        export_model(build("DETR"), "torchscript", tmp_path / "model.ts", size=SIZE)
    assert not (tmp_path / "model.ts").exists()


@pytest.mark.parametrize(
    ("format", "file", "keys", "message"),
    [
        ("coreml", "a.ml", {}, "there is no export to 'coreml'"),
        ("onnx", "a.pt2", {}, r"must end in \.onnx"),
        ("onnx", "a.onnx", {"batch": 0}, "must be at least 1"),
        ("onnx", "a.onnx", {"precision": "float16"}, "for openvino 'float16'"),
        ("onnx", "a.onnx", {"device": "cuda"}, "for aoti 'cuda'"),
    ],
)
def test_what_cannot_be_is_said(format: str, file: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_model(tiny.build("DETR"), format, tmp_path / file, **keys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no CUDA device here"):
        export_model(tiny.build("DETR"), "aoti", tmp_path / "a.pt2", device="cuda")


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_is_said_with_its_extra(
    format: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def absent(name: str, *args: Any) -> Any:
        if name == package:
            raise ImportError(f"No module named '{package}'")
        return builtins if name in ("onnx", "onnxscript") else real(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=rf"needs {package}.*detr_family\[{format}\]"):
        export_model(tiny.build("DETR"), format, tmp_path / f"a{SUFFIX[format]}")


@pytest.mark.parametrize(
    ("file", "package", "extra"), [("a.onnx", "onnxruntime", "onnx"), ("a.xml", "openvino", "openvino")]
)
def test_a_missing_runtime_is_said_with_its_extra(
    file: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}.*detr_family\[{extra}\]"):
        Predictor.from_exported(tmp_path / file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no exported detector"):
        ExportedDetector(tmp_path / "none.ts")
    (tmp_path / "model.ts").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.ts cannot be opened"):
        ExportedDetector(tmp_path / "model.ts")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "other.ts")
    with pytest.raises(UserError, match="says nothing about itself"):
        ExportedDetector(tmp_path / "other.ts")


def test_an_image_that_is_too_small_is_refused(script: tuple[SetDetector, Path]) -> None:
    detector = ExportedDetector(script[1])
    detector.about["least_size"] = [32, 32]
    with pytest.raises(UserError, match=r"an image of 16x48 is smaller than model\.ts takes, 32x32"):
        detector([{"image": torch.zeros(3, 16, 48, dtype=torch.uint8)}])


def test_an_openvino_file_is_run_by_several_threads(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="the openvino package is not installed")
    opset = importlib.import_module("openvino.opset13")
    images = opset.parameter([-1, -1], np.float32)
    doubled = opset.multiply(images, np.float32(2))
    model = openvino.Model([doubled, opset.add(images, np.float32(1)), opset.relu(images)], [images])
    model.set_rt_info("{}", ["detr_family"])
    openvino.save_model(model, tmp_path / "model.xml")
    run, _ = exported_module._open(tmp_path / "model.xml", 1)

    def ask(number: int) -> bool:
        given = torch.full((200, 100), float(number))
        return all(torch.equal(run(given)[0], 2 * given) for _ in range(50))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(4)))
