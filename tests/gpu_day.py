"""What only a card can show, in one command: `python tests/gpu_day.py`, meant to take under eight minutes.

Each check prints a line; with --out FOLDER, all answers lie in FOLDER/gpu_day.json. The exit status is the number of
checks that failed. `--device cpu --tiny` goes the same way without a card, as a test does.
"""

import argparse
import contextlib
import json
import signal
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

from crackseg_nb.core.checks import Stopped
from crackseg_nb.core.machine import describe_environment, get_device
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.core.seeds import seed_everything
from crackseg_nb.models import base, kernels
from crackseg_nb.models.registry import create_model
from crackseg_nb.runs.config import configure, read_config
from crackseg_nb.runs.experiment import prepare, run
from crackseg_nb.training.checkpoint import load_checkpoint
from crackseg_nb.training.losses import create_loss
from crackseg_nb.training.memory import estimate_memory

FAMILIES = {
    "swinv2_hybrid": dict(model="swinv2_hybrid", encoder="swinv2"),
    "unet, convolutions": dict(model="unet", encoder="resnet18"),
    "unet, attention": dict(model="unet", encoder="test_coatnet"),
    "deeplab_original": dict(model="deeplab_original"),
    "deeplab_optimized": dict(model="deeplab_optimized"),
}
TINY = ("unet, attention",)


def weights_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints", "best").model_state


def train(day, name: str, family: str, **settings) -> RunFolder:
    "Train a family for two epochs on drawn cracks and return its folder."
    side = 64 if day.tiny else 256
    base = dict(synthetic_images=12 if day.tiny else 48, image_size=side, batch_size=4, epochs=2, pretrained="false")
    config = configure(
        **FAMILIES[family] | base | dict(device=day.device, outputs=str(day.folder)) | settings, run_name=name
    )
    return run(config).folder


def machine(day) -> dict:
    "A kernel for this card, and what decides about its numbers."
    facts = describe_environment()
    if day.device == "cuda":
        get_device("cuda")  # raises where this build of torch has no kernels
        facts |= dict(capability=torch.cuda.get_device_capability(), built=torch.cuda.get_arch_list())
        facts |= dict(cudnn=torch.backends.cudnn.version(), free=torch.cuda.mem_get_info()[0])
    return facts


def repeats(day) -> dict:
    "Two runs of one seed end at the same weights, bit for bit, in the precision that the device takes."
    found = {}
    for family in day.families:
        one, other = (train(day, f"{family[:4]}{family[-4:]}-{number}", family) for number in (1, 2))
        same = all(torch.equal(value, weights_of(other)[key]) for key, value in weights_of(one).items())
        found[family] = same and (one / "history.csv").read_bytes() == (other / "history.csv").read_bytes()
    assert all(found.values()), found
    return found


def agrees(day) -> dict:
    "In float32, logits and gradients are those of the CPU."
    found = {}
    for family in day.families:
        seed_everything(1)
        settings = {key: value for key, value in FAMILIES[family].items() if key != "model"}
        model = create_model(FAMILIES[family]["model"], image_size=64, pretrained="false", **settings).eval()
        images, masks = torch.rand(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8)
        gradients = []
        for device in ("cpu", day.device):
            model = model.to(device)
            model.zero_grad()
            create_loss("focal_dice").to(device)(model(images.to(device)), masks.to(device)).backward()
            gradients.append([value.grad.cpu().double() for value in model.parameters() if value.grad is not None])
        away = sum(((a - b) ** 2).sum() for a, b in zip(*gradients)) / sum((a**2).sum() for a in gradients[0])
        found[family] = float(away.sqrt())
    assert max(found.values()) < 1e-3, found
    return found


def resumes(day) -> dict:
    "A run stopped after its first epoch and resumed ends at the weights of one that was not, dropout included."
    found = {}
    for amp in ("auto", "fp16") if day.device == "cuda" else ("off",):
        whole = train(day, f"whole-{amp}", day.families[0], amp=amp)
        settings = read_config(whole / "config.yaml") | dict(amp=amp, outputs=str(day.folder), run_name=f"cut-{amp}")
        cut = prepare(configure(**settings))
        with contextlib.suppress(Stopped):
            cut.train(on_epoch=lambda trainer: trainer.stop.note(signal.SIGTERM, None))
        assert cut.folder.state == "stopped", cut.folder.state
        resumed = run(configure(resume=str(cut.folder.path), outputs=str(day.folder))).folder
        found[amp] = all(torch.equal(value, weights_of(resumed)[key]) for key, value in weights_of(whole).items())
    assert all(found.values()), found
    return found


def few_kernels(day) -> dict:
    "The hybrid with fused attention and enlargement by matrix products: the same gradients, and how much faster."
    seed_everything(1)
    side = 64 if day.tiny else 360
    model = create_model("swinv2_hybrid", encoder="swinv2", image_size=side, pretrained="false").to(day.device).train()
    images, found, gradients = torch.rand(2, 3, side, side, device=day.device), {}, {}
    for way in ("few", "many", "few", "many"):
        with contextlib.ExitStack() as patches:
            for module in (base, kernels):
                patches.enter_context(mock.patch.object(module, "counts_starts", lambda tensor, way=way: way == "few"))
            for step in range(3 if day.tiny else 13):
                if step == 2:
                    start = clock(day)
                torch.manual_seed(1)
                model.zero_grad()
                model(images).square().mean().backward()
            found[f"{way}, ms"] = round(1000 * (clock(day) - start) / (step - 1), 2)
            gradient = torch.cat([value.grad.flatten() for value in model.parameters()]).double()
        again = gradients.setdefault(way, gradient)
        assert torch.equal(again, gradient), f"{way}: found other gradients the second time"
    away = float((gradients["few"] - gradients["many"]).norm() / gradients["many"].norm())
    assert away < 1e-3, away
    return found | {"difference of gradients": away}


def clock(day) -> float:
    "Return the time once the card has done its work."
    if day.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def waits(day) -> dict:
    "How often the host waits for the card in an epoch, by place; between two looks for NaN it should not."
    if day.device != "cuda":
        return {"left out": "only a card can be waited for"}
    experiment = prepare(configure(**small_unet(day)))
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            experiment.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = pd.Series(
        [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    )
    return places.value_counts().to_dict()


def small_unet(day) -> dict:
    family = FAMILIES["unet, convolutions"]
    return family | dict(
        pretrained="false",
        synthetic_images=48,
        image_size=128,
        batch_size=4,
        epochs=1,
        device=day.device,
        outputs=str(day.folder),
    )


def fits(day) -> dict:
    "The estimate of memory is a lower bound of the peak, and not far below."
    if day.device != "cuda":
        return {"left out": "the peak of a process on the CPU holds everything else"}
    found = {}
    for batch in (2, 8):
        model = create_model("unet", encoder="resnet18", image_size=256, pretrained="false").cuda()
        estimate = estimate_memory(model, batch, (256, 256), "cuda", torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(torch.rand(batch, 3, 256, 256, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() / 2**20
        found[batch] = dict(estimate=estimate.total, peak=peak)
        assert estimate.total <= 1.02 * peak, found
    return found


def halves(day) -> dict:
    "Where the memory is used up in mid-step, the step is repeated with fewer images at once, and the run ends well."
    if day.device != "cuda":
        return {"left out": "only a card's memory can be cut"}
    settings = small_unet(day) | dict(image_size=256, batch_size=16, amp="off", run_name="halves")
    model = create_model("unet", encoder="resnet18", image_size=256, pretrained="false").cuda()
    needed = estimate_memory(model, 16, (256, 256), "cuda")
    total = torch.cuda.mem_get_info()[1] / 2**20
    torch.cuda.set_per_process_memory_fraction(min(1.0, (needed.total - needed.activations / 2) / total))
    try:
        folder = run(configure(**settings)).folder
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    size = int(pd.read_csv(folder / "performance.csv")["micro_batch"].iloc[-1])
    assert size < 16, size
    return {"images at once": size}


def speed(day) -> dict:
    "Images per second of training, in the precision that the device takes and in float32."
    found = {}
    for family in day.families:
        for amp in ("auto", "off"):
            folder = train(day, f"speed-{len(found)}", family, amp=amp)
            table = pd.read_csv(folder / "performance.csv")
            found[f"{family}, amp {amp}"] = float(table["images_per_second"].iloc[-1])
    return found


CHECKS = (machine, repeats, resumes, agrees, few_kernels, waits, fits, halves, speed)


def main(words: list[str] | None = None) -> int:
    "Run all checks, print a line for each, and return how many failed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="one family at a small size")
    parser.add_argument("--out", default="", help="folder for gpu_day.json")
    day = parser.parse_args(words)
    day.families, answers, failed = TINY if day.tiny else tuple(FAMILIES), {}, 0
    with tempfile.TemporaryDirectory() as day.folder:
        for check in CHECKS:
            start = time.perf_counter()
            try:
                answers[check.__name__] = dict(holds=True, found=check(day))
            except Exception as error:  # every check is made, whatever became of the one before
                failed += 1
                answers[check.__name__] = dict(holds=False, error=f"{type(error).__name__}: {error}")
            answers[check.__name__]["seconds"] = round(time.perf_counter() - start, 1)
            print(json.dumps({check.__name__: answers[check.__name__]}, default=str), flush=True)
    if day.out:
        Path(day.out).mkdir(parents=True, exist_ok=True)
        (Path(day.out) / "gpu_day.json").write_text(json.dumps(answers, indent=1, default=str))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
