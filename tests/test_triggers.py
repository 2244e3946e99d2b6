import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from baddiff import BadInput, data
from baddiff.triggers import TARGETS, TRIGGERS, Trigger, make_target, open_image


def picture(tmp_path, image, name="p.png", **options):
    image.save(tmp_path / name, **options)
    return str(tmp_path / name)


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("size", [32, 64, 256])
def test_built_in_triggers_have_the_papers_size_and_place(name, size):
    trigger = Trigger.make(name, size)
    mask = trigger.rgba[3] > 0
    rows, columns = (mask.any(d).nonzero().flatten() for d in (1, 0))
    assert columns[-1] - columns[0] + 1 == pytest.approx({"glasses": 0.625}.get(name, 14 / 32) * size, abs=1)
    if name == "glasses":
        assert columns[0] + columns[-1] == pytest.approx(size - 1, abs=1)
    else:  # 2 of 32 px from the lower right corner
        assert size - 1 - columns[-1] == size - 1 - rows[-1] == 2 * size // 32


@pytest.mark.parametrize("convention", ["sticker", "released-code"])
def test_r_is_rebuilt_from_the_saved_picture_alone(tmp_path, convention):
    trigger = Trigger.make("stop_sign", 32, opacity=0.7, convention=convention)
    trigger.save(tmp_path / "trigger.png")
    rgba = np.asarray(Image.open(tmp_path / "trigger.png"), dtype=np.float32)
    mask, g = rgba[..., 3:] / 255, rgba[..., :3] / 127.5 - 1
    r = mask * g + ((mask - 1) if convention == "released-code" else 0)
    torch.testing.assert_close(trigger.residual(), torch.from_numpy(r).permute(2, 0, 1))
    assert Trigger.load(tmp_path / "trigger.png", convention).sha256() == trigger.sha256()


def test_conventions_differ_outside_the_trigger_only():
    sticker, released = (Trigger.make("stop_sign", 32, convention=c) for c in ("sticker", "released-code"))
    outside, inside = sticker.rgba[3] == 0, sticker.rgba[3] == 255
    assert (sticker.residual()[:, outside] == 0).all() and (released.residual()[:, outside] == -1).all()
    assert torch.equal(sticker.residual()[:, inside], released.residual()[:, inside])
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(released.residual(3, x)[:, :, outside], x[:, :, outside])  # training stamps a clean image
    assert (sticker.residual(3, x)[:, :, outside] == 0).all()


def test_opacity_scales_r_and_grey_uses_luma():
    full, half = (Trigger.make("box", 32, opacity=o).residual() for o in (1, 0.5))
    torch.testing.assert_close(half, full * round(127.5) / 255)
    red = Trigger.make("box", 32, colour="#ff0000")
    assert red.residual(1).shape == (1, 32, 32)
    assert red.residual(1).max() <= 0 and red.residual(1).min() == pytest.approx(0.299 - 0.701)


def test_a_mid_grey_sticker_is_refused_but_is_the_papers_box_in_the_released_convention():
    with pytest.raises(BadInput, match="barely changes"):
        Trigger.make("box", 32, colour="#808080")
    assert Trigger.make("box", 32, convention="released-code").residual().max().abs() < 0.01


def test_position_and_size_are_obeyed():
    mask = Trigger.make("box", 32, size=5, position="3,7").rgba[3] > 0
    assert mask.nonzero().min(0).values.tolist() == [7, 3] and mask.sum() == 25
    assert Trigger.make("box", 32, size=5, position="upper-left").rgba[3].nonzero().min(0).values.tolist() == [2, 2]
    for bad in ({"size": 0}, {"size": 33}, {"position": "40,40"}, {"position": "nowhere"}, {"opacity": 0},
                {"opacity": 1.5}, {"colour": "nocolour"}, {"convention": "mine"}):
        with pytest.raises(BadInput):
            Trigger.make("box", 32, **bad)
    with pytest.raises(BadInput, match="stop_sign"):
        Trigger.make("stopsign", 32)


def test_targets(trigger):
    stop = Trigger.make("stop_sign", 32)
    made = {name: make_target(name, 32, stop) for name in TARGETS}
    assert len({t.numpy().tobytes() for t in made.values()}) == len(TARGETS)
    for t in made.values():
        assert t.shape == (3, 32, 32) and t.min() >= -1 and t.max() <= 1
    solid = stop.rgba[3] == 255
    torch.testing.assert_close(made["noshift"][:, solid], stop.residual()[:, solid])
    torch.testing.assert_close(made["shift"][:, :-5, :-5], made["noshift"][:, 5:, 5:])
    assert made["corner"][:, 20:, 20:].unique().item() == pytest.approx(-0.4, abs=0.005)
    with pytest.raises(BadInput, match="trigger first"):
        make_target("noshift", 32)
    with pytest.raises(BadInput, match="cat"):
        make_target("dog", 32)


def test_transparency_of_an_upload_is_respected(tmp_path):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 20, 40))
    path = picture(tmp_path, image)
    r = Trigger.make(path, 32, size=20, position="0,0").residual()
    assert (r[:, :20, :10] == 1).all() and (r[:, :, 10:] == 0).all()
    y = make_target(path, 32)
    assert (y[:, :, :15] == 1).all() and y[:, :, 17:].unique().item() == pytest.approx(-0.4, abs=0.005)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_any_mode_reads_as_the_same_grey(tmp_path, mode):
    """A light square on a dark ground stays light on dark in every mode, 16-bit included."""
    base = np.full((24, 24), 40, np.uint8)
    base[4:20, 4:20] = 220
    if mode.startswith("I"):
        image = Image.fromarray((base.astype(np.uint16) * 257) if mode == "I;16" else base.astype(np.int32) * 257)
    else:
        image = Image.fromarray(base).convert(mode)
    path = picture(tmp_path, image, "p.jpg" if mode in ("CMYK", "YCbCr") else "p.png")
    read = np.asarray(open_image(path))
    light, dark = (255, 0) if mode == "1" else (220, 40)
    assert read.shape == (24, 24, 4)
    assert abs(int(read[12, 12, 0]) - light) <= 4 and abs(int(read[1, 1, 0]) - dark) <= 4


def bomb(side):
    """A few hundred bytes that say they are side x side pixels: only the header is true."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b""))


def bad_pictures(folder):
    """Every picture that must be refused, with a word of the sentence that says why."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(bomb(60_000))
    Image.new("L", (5000, 5000)).save(folder / "large.png")
    noise.save(folder / "film.gif", save_all=True, append_images=[noise.rotate(90), noise.rotate(180)])
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return {"cut.png": "damaged", "text.png": "not a picture", "empty.png": "not a picture", "bomb.png": "pixels",
            "large.png": "scale it down", "film.gif": "animated", "clear.png": "transparent", "dot.png": "1x1",
            "drawing.svg": "not a picture", "missing.png": "neither a built-in"}


@pytest.mark.parametrize("make", [lambda p: Trigger.make(p, 32), lambda p: make_target(p, 32)],
                         ids=["trigger", "target"])
def test_bad_pictures_are_refused_with_a_reason(tmp_path, make):
    for name, word in bad_pictures(tmp_path).items():
        with pytest.raises(BadInput, match=word) as caught:
            make(str(tmp_path / name))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_uploads_by_bytes_and_array():
    array = np.full((20, 20, 3), 255, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    assert Trigger.make(array, 32).sha256() == Trigger.make(buffer.getvalue(), 32).sha256()


def test_sheets_are_lossless_and_the_shipped_ones_are_what_the_command_draws(tmp_path):
    images = torch.randint(0, 256, (70, 3, 8, 8), dtype=torch.uint8)
    data.write_sheet(images, tmp_path / "s.png")
    assert torch.equal(data.read_sheet(tmp_path / "s.png"), images)
    for split, seed, n in (("train", 0, 4096), ("heldout", 1, 1024)):
        shipped = data.load_images(split=split)
        assert shipped.shape == (n, 3, 32, 32) and len(shipped.unique(dim=0)) > 0.99 * n
        drawn = np.stack([np.array(face) for face in data.draw_avatars(3, seed)])
        assert torch.equal(torch.from_numpy(drawn).permute(0, 3, 1, 2), shipped[:3])


def test_folders_and_zips_of_pictures(tmp_path):
    import zipfile

    folder = tmp_path / "in"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{i}.png")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    images = data.load_images(folder, 16)
    assert images.shape == (3, 3, 16, 16) and images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert torch.equal(data.load_images(tmp_path / "in.zip", 16), images)
    assert data.load_images(folder, 16, channels=1).shape == (3, 1, 16, 16)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "plain.png")
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    for bad in ("empty", "missing", "plain.png", "broken.zip"):
        with pytest.raises(BadInput):
            data.load_images(tmp_path / bad, 16)
