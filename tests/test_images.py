"Files that are no radiograph are refused in one line; the others come back pixel for pixel."
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cxr_nb.images import image_problems, load_radiograph, open_radiograph

RAMP = np.tile(np.linspace(20, 220, 64).round().astype(np.uint8), (64, 1))
GREY = Image.fromarray(RAMP)


def header_of_a_large_png(width, height):
    "A PNG whose header claims a size and whose pixels never come."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def rgb_of_16_bits(path):
    rows = b"".join(b"\0" + b"\x12\x34" * 3 * 64 for _ in range(64))
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
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
        found = image_problems(paths, decode)
        assert [bool(problem) for problem in found] == [not i % 7 for i in range(300)]
        assert found[7] == f"{tmp_path}/none7.png: no such image file"
