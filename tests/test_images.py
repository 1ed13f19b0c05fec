"Files that are no radiograph are refused in one line; the others come back pixel for pixel."
import io
import os
import struct
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cxr_nb.images import (
    DICOM, NEGATIVE, exclusion_reason, first_dicom, image_problems, inverted_images, is_dicom, load_radiograph, open_radiograph, polarity,
)
from cxr_nb.phantoms import write_phantoms

RAMP = np.tile(np.linspace(20, 220, 64).round().astype(np.uint8), (64, 1))
GREY = Image.fromarray(RAMP)


def chunk(kind, data):
    "A chunk of a PNG file, with its length and checksum."
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header_of_a_large_png(width, height):
    "A PNG whose header claims a size and whose pixels never come."
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def rgb_of_16_bits(path):
    rows = b"".join(b"\0" + b"\x12\x34" * 3 * 64 for _ in range(64))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def cut(path, share):
    GREY.resize((512, 512)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def damaged(path):
    "One byte of the pixels changed; decoding alone would give other grey levels."
    GREY.save(path, compress_level=0)
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x55
    path.write_bytes(content)


BAD = {
    "empty.png": (lambda p: p.write_bytes(b""), r"the file is empty \(0 bytes\)"),
    "cut.png": (lambda p: cut(p, 0.5), "is broken or truncated"),
    "cut.jpg": (lambda p: cut(p, 0.5), "is broken or truncated"),
    "header.jpg": (lambda p: cut(p, 0.01), "is (broken or truncated|no PNG or JPEG image)"),
    "16.png": (lambda p: Image.fromarray(RAMP.astype(np.uint16) * 16).save(p), "more than 8 bits per channel; window it"),
    "16rgb.png": (rgb_of_16_bits, "more than 8 bits per channel; window it"),
    "cmyk.jpg": (lambda p: GREY.convert("CMYK").save(p), "is CMYK"),
    "palette.png": (lambda p: GREY.convert("P").save(p), "has a colour palette"),
    "clear_palette.png": (lambda p: GREY.convert("P").save(p, transparency=0), "has a colour palette"),
    "alpha.png": (lambda p: Image.merge("LA", (GREY, Image.new("L", GREY.size, 200))).save(p), "has transparent pixels"),
    "rgba.png": (lambda p: Image.merge("RGBA", (GREY, GREY, GREY, GREY)).save(p), "has transparent pixels"),
    "keyed.png": (lambda p: GREY.save(p, transparency=20), "has transparent pixels"),
    "dot.png": (lambda p: GREY.resize((1, 1)).save(p), "is 1×1 pixels; a radiograph has at least 32"),
    "bits.png": (lambda p: GREY.convert("1").save(p), "one bit per pixel"),
    "huge.png": (lambda p: p.write_bytes(header_of_a_large_png(20_000, 20_000)), "megapixels; make it smaller"),
    "large.png": (lambda p: p.write_bytes(header_of_a_large_png(8_000, 8_000)), "is 8000×8000 pixels, more than 50 megapixels"),
    "text.png": (lambda p: p.write_text("not an image"), "is no PNG or JPEG image"),
    "page.tif": (lambda p: GREY.save(p), "is no PNG or JPEG image"),
    "folder.png": (lambda p: p.mkdir(), "no such image file"),
    "damaged.png": (damaged, "is broken or truncated"),
    "short.png": (lambda p: p.write_bytes(header_of_a_large_png(64, 64)[:20]), "is broken or truncated|is no PNG or JPEG image"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_refused_in_one_line_that_names_them(tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught: open_radiograph(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
def test_good_ones_come_back_as_they_were(tmp_path, mode):
    GREY.convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_radiograph(tmp_path / "a.png"), RAMP)


def test_problems_are_found_in_order_among_many(tmp_path):
    GREY.save(tmp_path / "good.png")
    paths = [tmp_path / ("good.png" if i % 7 else f"none{i}.png") for i in range(300)]
    for decode in (True, False):
        result = image_problems(paths, decode)
        assert [bool(problem) for problem in result] == [not i % 7 for i in range(300)]
        assert result[7] == f"{tmp_path}/none7.png: no such image file"


def bomb(kind):
    "A good PNG with a chunk before its pixels that unpacks to 80 MB."
    packed = zlib.compress(bytes(80_000_000), 9)
    data = {b"zTXt": b"Comment\0\0" + packed, b"iCCP": b"icc\0\0" + packed, b"iTXt": b"Comment\0\1\0\0\0" + packed}[kind]
    file = io.BytesIO()
    GREY.save(file, "PNG")
    content = file.getvalue()
    at = content.index(b"IDAT") - 4
    return content[:at] + chunk(kind, data) + content[at:]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_chunk_that_unpacks_to_much_is_refused_or_passed_over_in_little_memory(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(bomb(kind))
    tracemalloc.start()
    problem = image_problems([tmp_path / "a.png"])[0]
    assert tracemalloc.get_traced_memory()[1] < 20e6 and (not problem or "a.png: is broken or truncated" in problem) and "\n" not in problem
    tracemalloc.stop()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width, height", [(10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 33), (33, 2**31 - 1)])
def test_a_header_that_claims_too_many_pixels_is_refused_before_any_is_decoded(tmp_path, width, height):
    (tmp_path / "a.png").write_bytes(header_of_a_large_png(width, height))
    with pytest.raises(ValueError, match="a.png: is .*50 megapixels; make it smaller"): open_radiograph(tmp_path / "a.png")


def test_what_never_ends_is_no_image_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        for decode in (True, False): assert image_problems([tmp_path / name], decode) == [f"{tmp_path / name}: no such image file"]
    assert first_dicom(tmp_path) is None


# EXIF 2.32, Orientation: which side of the shown image the stored 0th row is, and which the stored 0th column
SHOWN = {
    1: lambda a: a,  # row 0 is the top, column 0 the left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a[::-1].swapaxes(0, 1),  # right, top
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda a: a[:, ::-1].swapaxes(0, 1),  # left, bottom
}
PATCHES = np.kron(np.arange(20, 220, 8, dtype=np.uint8)[:24].reshape(4, 6), np.ones((16, 16), np.uint8))  # blocks: JPEG keeps them


def exif_of(orientation, order="<", kind=3):
    "EXIF bytes with one entry, Orientation, as a 16-bit (kind 3) or a 32-bit (kind 4) number."
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *([orientation, 0] if kind == 3 else [orientation]))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "HHHI", 1, 0x0112, kind, 1) + value + struct.pack(order + "I", 0)


def in_colour(pixels): return np.stack([pixels, 255 - pixels, pixels // 2], -1)


def png_with(image, exif, behind):
    "A PNG's bytes with an eXIf chunk before or behind its pixels: both are allowed."
    file = io.BytesIO()
    image.save(file, "PNG")
    content = file.getvalue()
    at = content.index(b"IEND" if behind else b"IDAT") - 4
    return content[:at] + chunk(b"eXIf", exif) + content[at:]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_an_image_is_read_as_a_viewer_shows_it(tmp_path, orientation, mode, order):
    pixels, exif = PATCHES if mode == "L" else in_colour(PATCHES), exif_of(orientation, order)
    stored = Image.fromarray(pixels)
    for name in ("before.png", "behind.png"): (tmp_path / name).write_bytes(png_with(stored, exif, name[:6] == "behind"))
    stored.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif, quality=95, subsampling=0)
    right = SHOWN[orientation](pixels)
    for name, close in (("before.png", 0), ("behind.png", 0), ("a.jpg", 6)):
        shown = open_radiograph(tmp_path / name)
        assert (shown.mode, shown.size) == (mode, right.shape[1::-1])
        np.testing.assert_allclose(np.asarray(shown, int), right, atol=close)
    np.testing.assert_array_equal(load_radiograph(tmp_path / "before.png"), np.asarray(Image.fromarray(np.ascontiguousarray(right)).convert("L")))


def test_proportions_are_those_of_the_shown_image(tmp_path):
    noise = np.random.default_rng(0).integers(20, 220, (100, 160)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(png_with(Image.fromarray(noise), exif_of(6), False))
    assert exclusion_reason(open_radiograph(tmp_path / "a.png")) == "cropped: width to height is 0.62"
    np.testing.assert_array_equal(load_radiograph(tmp_path / "a.png", 100), SHOWN[6](noise[:, 30:130]))


@pytest.mark.parametrize("exif", [
    b"", b"II", b"Exif\0\0", b"no exif at all", exif_of(6)[:-8], exif_of(0), exif_of(9), exif_of(65535), exif_of(6, kind=2), exif_of(6, kind=9999),
    exif_of(6)[:4] + b"\xff\xff\xff\x7f" + exif_of(6)[8:], exif_of(6)[:8] + b"\xff\xff" + exif_of(6)[10:],
])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_malformed_exif_leaves_a_good_image_as_it_is_or_turns_it(tmp_path, exif):
    (tmp_path / "a.png").write_bytes(png_with(Image.fromarray(PATCHES), exif, False))
    Image.fromarray(PATCHES).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif, quality=95)
    for name in ("a.png", "a.jpg"):
        shown = load_radiograph(tmp_path / name).astype(int)
        assert any(shown.shape == SHOWN[n](PATCHES).shape and abs(shown - SHOWN[n](PATCHES)).max() < 6 for n in (1, 6))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_no_byte_of_exif_can_break_an_image(tmp_path):
    "Every byte of a larger EXIF block changed in turn, in all that a JPEG and a PNG carry."
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x0128] = 6, "maker", 72.0, 2
    exif.get_ifd(0x8769)[0x9000] = b"0232"
    good, rng = exif.tobytes(), np.random.default_rng(0)
    for i in range(len(good)):
        bad = bytearray(good)
        bad[i] = rng.integers(256)
        GREY.save(tmp_path / "a.jpg", exif=bytes(bad))
        (tmp_path / "a.png").write_bytes(png_with(GREY, bytes(bad[6:]), i % 2))
        assert image_problems([tmp_path / "a.jpg", tmp_path / "a.png"]) == ["", ""]


def test_orientation_in_a_png_of_older_tools_is_honoured(tmp_path):
    "ImageMagick's text chunk from before eXIf."
    raw, info = (b"Exif\0\0" + exif_of(6)).hex(), PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(raw) // 2:8}\n{raw}\n", zip=True)
    Image.fromarray(PATCHES).save(tmp_path / "a.png", pnginfo=info)
    np.testing.assert_array_equal(load_radiograph(tmp_path / "a.png"), SHOWN[6](PATCHES))


# ---- negatives

@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    "Phantoms of ten patients, in both views, with all that is drawn into them."
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 10, seed=5)
    return sorted((folder / "images").glob("*.png"))


def test_no_phantom_looks_inverted_and_every_negative_does(phantoms, tmp_path):
    assert len(phantoms) >= 10 and not any(inverted_images(phantoms))
    for path in phantoms: Image.fromarray(255 - np.asarray(Image.open(path).convert("L"))).save(tmp_path / path.name)
    assert all(inverted_images([tmp_path / path.name for path in phantoms]))
    assert not any(inverted_images([f"{tmp_path / path.name}{NEGATIVE}" for path in phantoms]))
    assert exclusion_reason(open_radiograph(tmp_path / phantoms[0].name)).startswith(("inverted: polarity -0.", "cropped", "colourised"))


@pytest.mark.parametrize("change", [
    lambda a: (a * 0.4 + 90).astype(np.uint8), lambda a: (255 * (a / 255) ** 2).astype(np.uint8), lambda a: a[:, ::-1], lambda a: np.kron(a, np.ones((3, 3), np.uint8)),
    lambda a: np.pad(a, ((0, 0), (20, 20))), lambda a: np.pad(a, 12, constant_values=255), lambda a: (a * np.linspace(0.4, 1, len(a))[:, None]).astype(np.uint8),
])
def test_exposure_frames_and_size_do_not_turn_a_radiograph_over(phantoms, change):
    for path in phantoms[:6]: assert polarity(np.ascontiguousarray(change(load_radiograph(path)))) > 0


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_negative_of_a_file_is_read_by_its_name(tmp_path, mode):
    pixels = PATCHES if mode == "L" else in_colour(PATCHES)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "turned.png").write_bytes(png_with(Image.fromarray(pixels), exif_of(6), False))
    np.testing.assert_array_equal(np.asarray(open_radiograph(tmp_path / "a.png#negative")), 255 - pixels)
    np.testing.assert_array_equal(np.asarray(open_radiograph(f"{tmp_path}/turned.png#negative")), 255 - SHOWN[6](pixels))
    assert image_problems([tmp_path / "a.png#negative", tmp_path / "b.png#negative"]) == ["", f"{tmp_path}/b.png: no such image file"]
    assert image_problems([tmp_path / "a.png#negative", tmp_path / "b.png#negative"], decode=False)[0] == ""


# ---- DICOM

def dicom(preamble=True):
    "The head of a DICOM file, with or without the part that came with the standard of 1993, and pixels to come."
    meta = b"\x02\0\0\0UL\x04\0\xb0\0\0\0" if preamble else b"\x08\0\x05\0\x0a\0\0\0ISO_IR 100"
    return (bytes(128) + b"DICM" if preamble else b"") + meta + b"\x08\0\x60\0CS\x02\0DX" + bytes(500)


@pytest.mark.parametrize("preamble", [True, False])
@pytest.mark.parametrize("name", ["a.dcm", "a.DCM", "a.png", "a.jpg", "IM0001", "a.dicom"])
def test_dicom_is_known_whatever_its_name_and_the_line_says_how_to_convert_it(tmp_path, name, preamble):
    (tmp_path / name).write_bytes(dicom(preamble))
    with pytest.raises(ValueError, match=f"{name}: is a DICOM file, which is not read; convert it to 8-bit PNG") as caught: open_radiograph(tmp_path / name)
    assert "\n" not in str(caught.value) and image_problems([tmp_path / name]) == [str(caught.value)]
    assert first_dicom(tmp_path) == tmp_path / name


def test_a_packed_dicom_and_one_in_the_place_of_an_image_are_named(tmp_path):
    (tmp_path / "a.dcm.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    (tmp_path / "b.dcm").write_bytes(dicom())
    with pytest.raises(ValueError, match="a.dcm.gz: is a DICOM file"): open_radiograph(tmp_path / "a.dcm.gz")
    for decode in (True, False): assert "b.jpg: no such image file; b.dcm beside it is a DICOM file, which is not read; convert" in image_problems([tmp_path / "b.jpg"], decode)[0]
    assert image_problems([tmp_path / "c.jpg"], False) == [f"{tmp_path}/c.jpg: no such image file"]


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x08\0 \x08", GREY.tobytes(), b"DICM" * 10])
def test_what_is_no_dicom_is_not_called_one(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert not is_dicom(tmp_path / "a.png") and not is_dicom(tmp_path / "none") and not is_dicom(tmp_path) and first_dicom(tmp_path) is None


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_the_code_that_the_line_gives_windows_and_turns_over(kind):
    "Run as it stands, with a window from 1000 to 3000 in place of pydicom's."
    shown = []
    ds = SimpleNamespace(pixel_array=np.array([[0, 1000, 2000, 3000, 4095]], np.uint16), PhotometricInterpretation=kind)
    names = {"np": np, "ds": ds, "apply_modality_lut": lambda a, ds: a, "apply_voi_lut": lambda a, ds: a.clip(1000, 3000) - 1000}
    names["Image"] = SimpleNamespace(fromarray=lambda a: SimpleNamespace(save=lambda name: shown.append((a, name))))
    exec(DICOM.partition("pydicom: ")[2], names)
    (pixels, name), right = shown[0], np.array([[0, 0, 127, 255, 255]])
    assert name == "x.png" and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, right if kind == "MONOCHROME2" else 255 - right - (right == 127))
