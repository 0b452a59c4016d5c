"""Reading, refusing and fitting input images: files written by Pillow or by hand, pixels judged by arithmetic."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from swifti2v.errors import ImageInputError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.media.images import MAX_PIXELS, as_loaded_image, fit_image, fit_notes, image_to_tensor, load_image

RED, GREEN, BLUE = (250, 10, 20), (20, 240, 10), (10, 30, 230)


def three_bars(mode: str = "RGB") -> Image.Image:
    """Red, green and blue columns, 60x40."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:40], pixels[:, 40:] = RED, GREEN, BLUE
    return Image.fromarray(pixels).convert(mode)


def pixel(image: Image.Image, x: int, y: int) -> np.ndarray:
    return np.asarray(image).astype(int)[y, x]


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"\0" * 64)) + block(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def check_refused(path: Path) -> str:
    """Return the message, which is one line, names the file, and ends with what to do."""
    with pytest.raises(ImageInputError) as caught:
        load_image(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message.rpartition(";")[0]
    return message


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "bmp", "jpg"])
def test_a_plain_picture_is_read_without_notes(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    loaded = load_image(save(three_bars(), tmp_path / f"a.{suffix}", **options))
    assert loaded.notes == ()
    assert loaded.image.mode == "RGB"
    difference = np.abs(np.asarray(loaded.image).astype(int) - np.asarray(three_bars()))
    assert difference.max() <= (4 if suffix == "jpg" else 0)


class TestRefused:
    def test_no_file(self, tmp_path: Path) -> None:
        check_refused(tmp_path / "none.png")
        check_refused(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"not a picture at all\n" * 10,
            struct.pack(">I", 24) + b"ftypheic" + b"\0" * 40,
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        ],
        ids=["empty", "text", "heic", "postscript that never reaches Ghostscript"],
    )
    def test_no_picture(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.jpg").write_bytes(content)
        assert ("HEIC" in check_refused(tmp_path / "a.jpg")) == (b"heic" in content)

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp"])
    @pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
    def test_truncated(self, tmp_path: Path, suffix: str, kept: float) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
        path = save(Image.fromarray(noise), tmp_path / f"a.{suffix}")
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept)])
        check_refused(path)

    def test_a_flipped_byte_in_png_data(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
        path = save(Image.fromarray(noise), tmp_path / "a.png")
        data = bytearray(path.read_bytes())
        data[60] ^= 0xFF
        path.write_bytes(data)
        check_refused(path)

    @pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (40_000, 40_000)])
    def test_huge_is_refused_before_decoding(self, tmp_path: Path, width: int, height: int) -> None:
        # Decoding would fail with "truncated" instead: the file holds 64 bytes of pixels.
        (tmp_path / "a.png").write_bytes(png_header(width, height))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_refused(tmp_path / "a.png")
        assert not caught

    def test_the_limit_itself_passes_the_header(self, tmp_path: Path) -> None:
        assert MAX_PIXELS == 100_000_000
        (tmp_path / "a.png").write_bytes(png_header(10_000, 10_000))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_refused(tmp_path / "a.png")
        assert not caught

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
    def test_animated(self, tmp_path: Path, suffix: str) -> None:
        frames = [three_bars(), three_bars().rotate(180)]
        path = save(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=40)
        check_refused(path)

    def test_pages(self, tmp_path: Path) -> None:
        path = save(three_bars(), tmp_path / "a.tiff", save_all=True, append_images=[three_bars().rotate(180)])
        check_refused(path)

    def test_floating_point_pixels(self, tmp_path: Path) -> None:
        path = save(Image.fromarray(np.ones((8, 8), np.float32)), tmp_path / "a.tiff")
        check_refused(path)


class TestHandledAndSaid:
    def test_cmyk(self, tmp_path: Path) -> None:
        loaded = load_image(save(three_bars("CMYK"), tmp_path / "a.jpg", quality=100, subsampling=0))
        assert loaded.notes == ("converted from CMYK to RGB",)
        assert np.abs(pixel(loaded.image, 10, 20) - RED).max() < 12

    def test_grayscale(self, tmp_path: Path) -> None:
        loaded = load_image(save(three_bars("L"), tmp_path / "a.png"))
        assert loaded.notes == ("converted from grayscale to RGB",)
        assert len(set(pixel(loaded.image, 30, 20))) == 1

    def test_sixteen_bit_grayscale_is_scaled_not_clipped(self, tmp_path: Path) -> None:
        ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))
        loaded = load_image(save(Image.fromarray(ramp), tmp_path / "a.png"))
        assert loaded.notes == ("reduced from 16 to 8 bits per channel", "converted from grayscale to RGB")
        assert np.abs(np.asarray(loaded.image)[0, :, 0] - ramp[0] / 257.0).max() <= 0.51

    def test_sixteen_bit_color(self, tmp_path: Path) -> None:
        row = struct.pack(">6H", *([60_000, 30_000, 1_000] * 2))
        data = bytearray(png_header(2, 1))
        del data[8:]

        def block(kind: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        data += block(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        data += block(b"IDAT", zlib.compress(b"\0" + row)) + block(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(data)
        loaded = load_image(tmp_path / "a.png")
        assert loaded.notes == ("reduced from 16 to 8 bits per channel",)
        assert np.abs(pixel(loaded.image, 0, 0) - np.array([60_000, 30_000, 1_000]) / 257).max() <= 1

    def test_a_size_of_sixteen_hundred_is_not_sixteen_bits(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (1600, 16), RED)
        for suffix in ("bmp", "tga", "ppm", "tiff"):
            assert load_image(save(image, tmp_path / f"a.{suffix}")).notes == ()

    def test_palette(self, tmp_path: Path) -> None:
        loaded = load_image(save(three_bars().convert("P", palette=Image.Palette.ADAPTIVE), tmp_path / "a.png"))
        assert loaded.notes == ("converted from a color palette",)
        assert np.abs(pixel(loaded.image, 50, 5) - BLUE).max() <= 2

    def test_still_gif(self, tmp_path: Path) -> None:
        loaded = load_image(save(three_bars(), tmp_path / "a.gif"))
        assert np.abs(pixel(loaded.image, 10, 5) - RED).max() <= 30

    def test_alpha_is_laid_on_white(self, tmp_path: Path) -> None:
        image = three_bars("RGBA")
        alpha = np.full((40, 60), 255, np.uint8)
        alpha[:10], alpha[10:20] = 0, 128
        image.putalpha(Image.fromarray(alpha))
        loaded = load_image(save(image, tmp_path / "a.png"))
        assert loaded.notes == ("transparent parts laid on white",)
        assert tuple(pixel(loaded.image, 10, 5)) == (255, 255, 255)
        half = np.array(RED) * 128 / 255 + 255 * 127 / 255
        assert np.abs(pixel(loaded.image, 10, 15) - half).max() <= 1
        assert tuple(pixel(loaded.image, 10, 30)) == RED

    def test_opaque_alpha_needs_no_note(self, tmp_path: Path) -> None:
        loaded = load_image(save(three_bars("RGBA"), tmp_path / "a.png"))
        assert loaded.notes == ()
        assert tuple(pixel(loaded.image, 50, 5)) == BLUE

    def test_transparent_palette_color(self, tmp_path: Path) -> None:
        image = three_bars().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
        loaded = load_image(save(image, tmp_path / "a.png", transparency=image.getpixel((10, 5))))
        assert loaded.notes == ("converted from a color palette", "transparent parts laid on white")
        assert tuple(pixel(loaded.image, 10, 5)) == (255, 255, 255)
        assert np.abs(pixel(loaded.image, 30, 5) - GREEN).max() <= 2

    def test_transparent_rgb_color(self, tmp_path: Path) -> None:
        loaded = load_image(save(three_bars(), tmp_path / "a.png", transparency=RED))
        assert tuple(pixel(loaded.image, 10, 5)) == (255, 255, 255)
        assert tuple(pixel(loaded.image, 30, 5)) == GREEN

    @pytest.mark.parametrize(
        ("orientation", "size", "red_at"),
        [(1, (60, 40), (0, 0)), (3, (60, 40), (59, 39)), (6, (40, 60), (39, 0)), (8, (40, 60), (0, 59))],
    )
    def test_exif_orientation(
        self, tmp_path: Path, orientation: int, size: tuple[int, int], red_at: tuple[int, int]
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        loaded = load_image(save(three_bars(), tmp_path / "a.jpg", exif=exif, quality=98, subsampling=0))
        assert loaded.image.size == size
        assert np.abs(pixel(loaded.image, *red_at) - RED).max() < 15
        assert loaded.notes == (() if orientation == 1 else ("rotated by its EXIF orientation",))
        assert 0x0112 not in loaded.image.getexif()

    def test_two_pictures_of_a_camera(self, tmp_path: Path) -> None:
        path = save(three_bars(), tmp_path / "a.mpo", save_all=True, append_images=[three_bars().rotate(180)])
        loaded = load_image(path)
        assert loaded.notes == ("took the first of the 2 pictures in the file",)
        assert np.abs(pixel(loaded.image, 5, 20) - RED).max() < 40


class TestColorProfiles:
    def test_srgb_profile_changes_nothing(self, tmp_path: Path) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        loaded = load_image(save(three_bars(), tmp_path / "a.png", icc_profile=profile))
        assert loaded.notes == ()
        assert np.array_equal(np.asarray(loaded.image), np.asarray(three_bars()))
        assert "icc_profile" not in loaded.image.info

    def test_other_profile_is_applied(self, tmp_path: Path) -> None:
        # The sRGB profile with its red and blue columns exchanged: pixels must come out exchanged too.
        original = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        profile = original.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
        profile = profile.replace("sRGB".encode("utf-16-be"), "Odd!".encode("utf-16-be"))
        assert "Odd!" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        loaded = load_image(save(three_bars(), tmp_path / "a.png", icc_profile=profile))
        assert len(loaded.notes) == 1
        assert loaded.notes[0].startswith("colors converted to sRGB")
        assert np.abs(pixel(loaded.image, 10, 5) - RED[::-1]).max() <= 3

    def test_damaged_profile_is_said(self, tmp_path: Path) -> None:
        loaded = load_image(save(three_bars(), tmp_path / "a.png", icc_profile=b"nonsense" * 20))
        assert loaded.notes == ("colors taken as sRGB: its embedded color profile cannot be used",)
        assert tuple(pixel(loaded.image, 10, 5)) == RED

    def test_profile_of_another_kind_of_pixels_is_said(self, tmp_path: Path) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        odd = profile.replace("sRGB".encode("utf-16-be"), "Odd!".encode("utf-16-be"))
        loaded = load_image(save(three_bars("L"), tmp_path / "a.png", icc_profile=odd))
        assert any("cannot be used" in note for note in loaded.notes)


class TestFit:
    @pytest.mark.parametrize("source", [(60, 40), (40, 60), (1000, 30), (1, 1), (1, 999)])
    def test_always_exactly_the_size(self, source: tuple[int, int]) -> None:
        image = Image.new("RGB", source, RED)
        fitted = fit_image(image, Size(64, 32))
        assert fitted.size == (64, 32)
        assert (np.asarray(fitted) == RED).all()

    def test_same_size_is_untouched(self) -> None:
        fitted = fit_image(three_bars(), Size(60, 40))
        assert np.array_equal(np.asarray(fitted), np.asarray(three_bars()))

    def test_the_cut_is_central(self) -> None:
        ramp = np.tile(np.arange(200, dtype=np.uint8), (50, 1))
        image = Image.fromarray(np.stack([ramp] * 3, -1))
        fitted = np.asarray(fit_image(image, Size(100, 50)))[25, :, 0]  # no scaling: columns 50..149
        assert np.array_equal(fitted, np.arange(50, 150))

    def test_reduction_is_antialiased(self) -> None:
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[:, ::2] = 255
        fitted = np.asarray(fit_image(Image.fromarray(stripes), Size(16, 16))).astype(int)
        assert np.abs(fitted - 127).max() <= 12

    def test_notes(self) -> None:
        assert fit_notes(Image.new("RGB", (1280, 704)), Size(640, 352)) == ()
        cut = fit_notes(Image.new("RGB", (1000, 1000)), Size(1000, 500))
        assert len(cut) == 1
        assert cut[0].endswith("(50% of the picture left out)")  # turning the output would not help a square
        portrait = fit_notes(Image.new("RGB", (704, 1280)), Size(1280, 704))
        assert portrait[0].endswith("(70% of the picture left out); a size of 704x1280 would leave out less")
        assert "would" not in fit_notes(Image.new("RGB", (1000, 800)), Size(1280, 704))[0]
        small = fit_notes(Image.new("RGB", (128, 64)), Size(1280, 640))
        assert len(small) == 1
        assert "10.0 times" in small[0]


class TestPicturesInMemory:
    def test_are_treated_as_their_files(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        image = three_bars("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        path = save(image, tmp_path / "a.png", exif=exif)
        by_name, opened = load_image(path), as_loaded_image(Image.open(path))
        assert opened.notes == by_name.notes == ("rotated by its EXIF orientation", "transparent parts laid on white")
        assert opened.image.tobytes() == by_name.image.tobytes()
        assert as_loaded_image(str(path)).image.tobytes() == by_name.image.tobytes()

    def test_are_left_as_they_were(self) -> None:
        image = three_bars("RGBA")
        before = image.tobytes()
        loaded = as_loaded_image(image)
        assert (image.mode, image.tobytes()) == ("RGBA", before)
        assert loaded.notes == ()

    def test_truncated(self, tmp_path: Path) -> None:
        path = save(three_bars(), tmp_path / "a.png")
        path.write_bytes(path.read_bytes()[:-60])
        with Image.open(path) as image, pytest.raises(ImageInputError, match=r"a\.png' is truncated or damaged"):
            as_loaded_image(image)

    @pytest.mark.parametrize("given", [np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), None, 3])
    def test_arrays_are_refused_with_the_way_to_give_them(self, given: object) -> None:
        with pytest.raises(InvalidInputError, match=r"PIL\.Image\.fromarray"):
            as_loaded_image(given)  # type: ignore[arg-type]


def test_tensor_range_and_layout() -> None:
    tensor = image_to_tensor(three_bars())
    assert tensor.shape == (3, 40, 60)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    expected = torch.tensor(RED) / 127.5 - 1
    assert torch.allclose(tensor[:, 5, 10], expected, atol=1e-6)
    assert image_to_tensor(Image.new("RGB", (2, 2), "white")).max() == 1.0
    assert image_to_tensor(Image.new("RGB", (2, 2), "black")).min() == -1.0
    with pytest.raises(InvalidInputError, match="mode L"):
        image_to_tensor(Image.new("L", (2, 2)))
