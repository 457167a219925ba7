"""Two hundred broken or odd videos and images, made by a seed, and a reader of them that survives crashes and hangs.

    python tests/modeling_gve/broken_inputs.py [FOLDER] [--seed 0]

makes and reads all of them, and prints what became of each. Every input is read by a process of its own kind that is
killed after `MAX_SECONDS`, so that a decoder that crashes or hangs is a result and not the end.
"""

import argparse
import importlib.util
import io
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import wave
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image


MAX_SECONDS = 10
CORNERS = ((200, 40, 40), (40, 180, 60), (40, 60, 200), (220, 220, 220))  # top left, top right, bottom left and right
READER = Path(__file__).parents[2] / "modeling_gve" / "video_gve.py"
LIMITS = {"max_pixels": 2**24, "max_seconds": 600.0, "max_bytes": 2**26}


class Case(NamedTuple):
    """One input.

    Attributes:
        name (`str`): file name, unique.
        kind (`str`): `"video"` or `"image"`.
        make (callable): `make(path)` writes the file.
        reason (`str`, *optional*): words of the error that names what is broken; None where the input is only odd.
        shape (tuple, *optional*): height and width that an odd input has.
        corners (tuple, *optional*): its colours as `CORNERS`, None where they are not known.
        seconds (`float`, *optional*): from its first frame to its last.
    """

    name: str
    kind: str
    make: object
    reason: str | None = None
    shape: tuple | None = None
    corners: tuple | None = CORNERS
    seconds: float | None = None


def picture(height, width, channels=3):
    """Four fields of the colours of `CORNERS`."""
    frame = np.zeros((height, width, channels), np.uint8)
    frame[..., 3:] = 255
    for index, colour in enumerate(CORNERS):
        rows = slice(0, height // 2) if index < 2 else slice(height // 2, None)
        columns = slice(0, width // 2) if index % 2 == 0 else slice(width // 2, None)
        frame[rows, columns, :3] = colour
    return frame


def encode(
    path, codec="libx264", pixels="yuv420p", size=(64, 96), count=24, rate=8, stamps=None, format=None, **options
):
    """Write a still clip; `stamps` in milliseconds replace the constant rate, `options` are the codec's."""
    movflags = options.pop("movflags", None)
    with av.open(str(path), "w", format=format, options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
            count = len(stamps)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(*size), format="rgb24").reformat(format=pixels)
            frame.pts = index if stamps is None else stamps[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def encoded(name, **settings):
    """The bytes of a clip, made once for all the cases that damage it."""
    key = (name, *sorted(settings.items()))
    if key not in _ENCODED:
        with tempfile.TemporaryDirectory() as folder:
            encode(Path(folder) / name, **settings)
            _ENCODED[key] = (Path(folder) / name).read_bytes()
    return bytearray(_ENCODED[key])


_ENCODED = {}
QUIET265 = {"x265-params": "log-level=none"}
FAST_VPX = {"deadline": "realtime", "cpu-used": "8"}
FORMS = {
    "a.mp4": {},
    "b.mp4": {"movflags": "faststart"},
    "c.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "d.mkv": {"g": "6"},
    "e.webm": {"codec": "libvpx-vp9", **FAST_VPX},
    "f.webm": {"codec": "libvpx", **FAST_VPX},
    "g.avi": {"codec": "mpeg4"},
    "h.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "i.flv": {"codec": "flv"},
    "j.mov": {"codec": "prores", "pixels": "yuv422p10le"},
    "k.mp4": {"codec": "libx265", **QUIET265},
}


def cases(seed=0):
    """All cases, the same for the same seed; the names differ, and there are 200."""
    rng = np.random.default_rng(seed)
    found = [*_cut_files(), *_damaged_files(rng), *_false_files(rng)]
    found += [*_odd_videos(), *_limits(), *_links(), *_images(rng)]
    assert len({case.name for case in found}) == len(found) == 200, len(found)
    return found


def _writer(data):
    return lambda path: path.write_bytes(bytes(data() if callable(data) else data))


def _cut_files():
    """Files that end too early: 11 forms at 4 lengths."""
    for name, settings in FORMS.items():
        for share in (0.02, 0.3, 0.6, 0.8):

            def data(name=name, settings=settings, share=share):
                whole = encoded(name, **settings)
                return whole[: int(len(whole) * share)]

            yield Case(f"cut_{int(100 * share)}_{name}", "video", _writer(data), reason="")


def _damaged_files(rng):
    """Noise over the middle of files whose codecs can tell: 6 forms, 5 times each."""
    for name in ("a.mp4", "b.mp4", "d.mkv", "g.avi", "h.avi", "i.flv"):
        for number in range(5):
            seed = int(rng.integers(2**31))

            def data(name=name, seed=seed):
                whole, noise = encoded(name, **FORMS[name]), np.random.default_rng(seed)
                # Behind the container's own tables, which lie in front of the pictures.
                start = {"mp4": b"mdat", "avi": b"movi", "mkv": b"\x1f\x43\xb6\x75", "flv": b"onMetaData"}[name[2:]]
                start = whole.index(start) + 400
                middle = range(start, start + (len(whole) - start) * 2 // 3)
                for place in noise.choice(middle, len(middle) // 3, replace=False):
                    whole[place] = noise.integers(256)
                return whole

            yield Case(f"damaged_{number}_{name}", "video", _writer(data), reason="")


def _false_files(rng):
    """What is no video at all: 31 cases."""
    texts = {
        "page.mp4": (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "not a readable"),
        "page_long.mp4": (b"<html>" + b"<p>Sign in to continue</p>" * 9999, "not a readable"),
        "error.mp4": (b'{"error": "rate limited"}', "not a readable"),
        "note.txt": (b"no video\n" * 300, "not a readable"),
        "list.m3u8": (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n",
            "not a readable",
        ),
        "playlist.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://192.0.2.1/a.ts\n", "not a readable"),
        "list.ffconcat": (b"ffconcat version 1.0\nfile 'other.mp4'\n", "not a readable"),
        "session.sdp": (
            b"v=0\nm=video 5004 RTP/AVP 96\nc=IN IP4 192.0.2.1\na=rtpmap:96 H264/90000\n",
            "not a readable",
        ),
        "subtitles.mp4": (b"1\n00:00:00,000 --> 00:00:01,000\nhello\n", "not a readable"),
        "script.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "not a readable"),
        "empty.mp4": (b"", "empty"),
        "empty.webm": (b"", "empty"),
        "byte.mp4": (b"\0", "not a readable"),
        "zeros.mp4": (bytes(100_000), "not a readable"),
        "ftyp.mp4": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "not a readable"),
        "no_moov.mp4": (
            b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + struct.pack(">I", 5000) + b"mdat" + bytes(4992),
            "not a",
        ),
        "endless_box.mp4": (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2\xff\xff\xff\xffmoov", "no video stream"),
        "ebml.webm": (b"\x1aE\xdf\xa3\x01" + bytes(7) + b"\x42\x82\x84webm", "not a readable"),
        "riff.avi": (b"RIFF\x10\0\0\0AVI LIST", "not a readable"),
        "flv.flv": (b"FLV\x01\x01\0\0\0\x09\0\0\0\0", ""),
        "zip.mp4": (b"PK\x03\x04" + bytes(2000), "not a readable"),
        "pdf.mp4": (b"%PDF-1.7\n" + b"%\xe2\xe3\xcf\xd3\n" * 99, "not a readable"),
    }
    for name, (data, reason) in texts.items():
        yield Case(f"false_{name}", "video", _writer(data), reason)
    for size in (10, 1_000, 100_000, 1_000_000):
        yield Case(f"false_noise_{size}.mp4", "video", _writer(rng.bytes(size)), "not a readable")
    for name, magic in {
        "mp4": b"\0\0\0\x18ftypisom",
        "webm": b"\x1aE\xdf\xa3",
        "avi": b"RIFF\xff\xff\0\0AVI ",
    }.items():
        yield Case(f"false_magic.{name}", "video", _writer(magic + rng.bytes(50_000)), "")
    yield Case("false_sound.wav", "video", _sound, "no video stream")
    yield Case("false_no_frames.mp4", "video", lambda path: encode(path, count=0, movflags="empty_moov"), "")


def _sound(path):
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "NONE"))
        sound.writeframes(bytes(16000))


def _odd_videos():
    """Sound files that few expect: sizes, containers, depths, clocks, orientations, 57 cases."""
    for size in ((1, 1), (1, 7), (2, 2), (3, 5), (16, 4096), (4096, 16), (17, 31), (31, 999), (721, 1281)):
        corners = CORNERS if min(size) > 16 else None
        yield _odd(f"size_{size[1]}x{size[0]}.mkv", size=size, codec="ffv1", pixels="bgr0", corners=corners)
    for size in ((2, 2), (16, 16), (16, 4096), (4096, 16), (18, 34), (480, 854)):
        corners = CORNERS if min(size) > 16 else None
        yield _odd(f"size_{size[1]}x{size[0]}.mp4", size=size, corners=corners)
    yield _odd("size_33x17.mp4", size=(17, 33), pixels="yuv444p")
    for count in (1, 2, 3, 5, 7, 9):
        yield _odd(f"frames_{count}.mp4", count=count)
    for count in (1, 2, 9):
        yield _odd(f"frames_{count}.webm", count=count, codec="libvpx-vp9", **FAST_VPX)
    containers = {
        "plain.avi": {"codec": "mpeg4"},
        "reordered.avi": {"codec": "mpeg4", "bf": "2"},
        "h264_reordered.avi": {},
        "motion.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
        "lossless.avi": {"codec": "huffyuv", "pixels": "rgb24"},
        "vp8.webm": {"codec": "libvpx", **FAST_VPX},
        "vp8_hidden.webm": {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16", **FAST_VPX},
        "vp9.webm": {"codec": "libvpx-vp9", **FAST_VPX},
        "alpha.webm": {"codec": "libvpx-vp9", "pixels": "yuva420p", **FAST_VPX},
        "alpha.mov": {"codec": "prores_ks", "pixels": "yuva444p10le"},
        "alpha.mkv": {"codec": "ffv1", "pixels": "bgra"},
        "ten_bit.mp4": {"pixels": "yuv420p10le"},
        "ten_bit_hevc.mp4": {"codec": "libx265", "pixels": "yuv420p10le", **QUIET265},
        "hevc.mp4": {"codec": "libx265", **QUIET265},
        "open.mp4": {"codec": "libx265", "x265-params": "log-level=none:keyint=8:open-gop=1"},
        "open.mkv": {"x264-params": "open-gop=1:keyint=8"},
        "four_two_two.mov": {"codec": "prores", "pixels": "yuv422p10le"},
        "transport.ts": {},
        "program.mpg": {"codec": "mpeg2video", "rate": 25},
        "transport2.ts": {"codec": "mpeg2video", "rate": 25},
        "windows.wmv": {"codec": "wmv2"},
        "flash.flv": {},
        "fragments.mp4": {"movflags": "frag_keyframe+empty_moov", "g": "6"},
        "anim.gif": {"codec": "gif", "pixels": "rgb8"},
        "anim.apng": {"codec": "apng", "pixels": "rgb24"},
        "grey.mp4": {"pixels": "gray", "corners": None},
        "wrong_name.txt": {"format": "mp4"},
        "name with spaces; $(x) ünïcode.mp4": {},
        "file:colon.mp4": {"format": "mp4"},
    }
    for name, settings in containers.items():
        yield _odd(name, **settings)
    stamps = {"uneven": [0, 500, 1000, 2000, 4000, 4500, 6000, 9000], "burst": [0, 1, 2, 3, 4, 5, 6, 5000]}
    for name, values in stamps.items():
        settings = {"stamps": values}
        case = Case(f"odd_{name}.mp4", "video", lambda path, s=settings: encode(path, **s), shape=(64, 96))
        yield case._replace(seconds=values[-1] / 1000)


def _odd(name, corners=CORNERS, **settings):
    count, rate = settings.get("count", 24), settings.get("rate", 8)
    return Case(
        f"odd_{name}",
        "video",
        lambda path: encode(path, **settings),
        shape=settings.get("size", (64, 96)),
        corners=corners,
        seconds=(count - 1) / rate,
    )


def _turned(matrix):
    def make(path):
        data = encoded("b.mp4", movflags="faststart")
        place = data.index(b"tkhd") + 44  # the matrix of a version 0 track header
        a, b, c, d = (value << 16 for value in matrix)
        data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(data)

    return make


def _limits():
    """Orientation, and files beyond the limits: 7 and 4 cases."""
    tl, tr, bl, br = CORNERS
    turns = {
        "90": ((0, 1, -1, 0), (96, 64), (bl, tl, br, tr)),
        "180": ((-1, 0, 0, -1), (64, 96), (br, bl, tr, tl)),
        "270": ((0, -1, 1, 0), (96, 64), (tr, br, tl, bl)),
        "mirror": ((-1, 0, 0, 1), (64, 96), (tr, tl, br, bl)),
        "flip": ((1, 0, 0, -1), (64, 96), (bl, br, tl, tr)),
        "transpose": ((0, 1, 1, 0), (96, 64), (tl, bl, tr, br)),
        "zero": ((0, 0, 0, 0), (64, 96), CORNERS),
    }
    for name, (matrix, shape, corners) in turns.items():
        yield Case(f"turned_{name}.mp4", "video", _turned(matrix), shape=shape, corners=corners, seconds=23 / 8)
    giant = {"size": (4200, 4200), "count": 1, "codec": "mjpeg", "pixels": "yuvj420p"}
    yield Case("bomb_pixels.avi", "video", lambda path: encode(path, **giant), "max_pixels")
    yield Case("bomb_seconds.mp4", "video", lambda path: encode(path, stamps=[0, 1, 700_000, 700_001]), "max_seconds")
    yield Case("bomb_seconds.mkv", "video", lambda path: encode(path, stamps=[0, 1, 700_000, 700_001]), "max_seconds")
    yield Case("bomb_bytes.mp4", "video", _sparse, "max_bytes")


def _sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**30)


def _links():
    """Paths that are no files: 6 cases."""
    yield Case("path_circle.mp4", "video", lambda path: path.symlink_to(path.name), "no readable video file")
    yield Case("path_dangling.mp4", "video", lambda path: path.symlink_to("gone.mp4"), "no such video file")
    yield Case("path_folder.mp4", "video", lambda path: path.mkdir(), "a directory")
    yield Case("path_missing.mp4", "video", lambda path: None, "no such video file")
    yield Case("path_pipe.mp4", "video", lambda path: os.mkfifo(path), "a device or pipe")
    yield Case("path_circle.png", "image", lambda path: path.symlink_to(path.name), "no readable image file")


def _images(rng):
    """Images: broken, odd, and bombs."""
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        if suffix != "gif":  # a GIF that ends early shows nothing of it

            def cut(path):
                data = _image_bytes(path.suffix)
                path.write_bytes(data[: len(data) // 2])

            yield Case(f"image_cut.{suffix}", "image", cut, "not a readable image")
        yield Case(f"image_noise.{suffix}", "image", _writer(rng.bytes(3000)), "unknown format")
    yield Case("image_page.png", "image", _writer(b"<html>404</html>"), "unknown format")
    yield Case("image_empty.png", "image", _writer(b""), "empty")
    yield Case("image_bomb.png", "image", lambda path: Image.new("1", (9000, 9000)).save(path), "max_pixels")
    yield Case("image_eps.eps", "image", lambda path: Image.fromarray(picture(9, 9)).save(path), "EPS")
    yield Case("image_1x1.png", "image", _save(picture(1, 1)), shape=(1, 1), corners=None)
    for name, mode in (("rgba.png", "RGBA"), ("palette.gif", "P"), ("cmyk.jpg", "CMYK")):
        yield Case(f"image_{name}", "image", _save(picture(64, 96), mode), shape=(64, 96))
    deep = np.full((64, 96), 128 << 8, np.uint16)
    yield Case("image_16_bit.png", "image", _save(deep, None), shape=(64, 96), corners=((128,) * 3,) * 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by 90 degrees
    tl, tr, bl, br = CORNERS
    turned = _save(picture(64, 96), exif=exif.tobytes(), quality=95)
    yield Case("image_turned.jpg", "image", turned, shape=(96, 64), corners=(bl, tl, br, tr))
    spoilt = _save(picture(64, 96), exif=b"Exif\0\0II*\0" + b"\xff" * 40, quality=95)
    yield Case("image_bad_exif.jpg", "image", spoilt, shape=(64, 96))


def _image_bytes(suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {".jpg": "JPEG", ".tiff": "TIFF"}.get(suffix, suffix[1:].upper()))
    return buffer.getvalue()


def _save(pixels, mode="RGB", **options):
    image = Image.fromarray(pixels)
    return lambda path: (image.convert(mode) if mode else image).save(path, **options)


def verdict(case, answer):
    """What is wrong with an answer of [`Reader`], or None."""
    if "reason" in answer:
        named = case.name in answer["reason"] and "\n" not in answer["reason"]
        if case.reason is None or not named or case.reason not in answer["reason"]:
            return answer["reason"]
        return None
    if "shape" not in answer:
        return answer["failure"]
    if case.reason is not None:
        return "read as if it were sound"
    if tuple(answer["shape"]) != ((8, *case.shape, 3) if case.kind == "video" else (*case.shape, 3)):
        return f"shape {answer['shape']}"
    if case.seconds is not None and abs(answer["seconds"] - case.seconds) > 0.02 + 0.01 * case.seconds:
        return f"{answer['seconds']} seconds instead of {case.seconds}"
    if case.corners is not None and np.abs(np.subtract(answer["corners"], [case.corners])).max() > 60:
        return f"colours {answer['corners']}"
    return None


class Reader:
    """Reads inputs in a process that is started anew whenever one of them crashes it or takes too long."""

    def __init__(self):
        self._process = None

    def __call__(self, kind, path, decoder="auto"):
        """`{"shape", "seconds", "corners"}` of what was read, `{"reason"}`, or `{"failure"}` for a crash or a hang."""
        if self._process is None:
            command = [sys.executable, __file__, "--serve"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._process.stdout.readline()  # it has loaded
        self._process.stdin.write((json.dumps([kind, str(path), decoder]) + "\n").encode())
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], MAX_SECONDS)[0]:
            self.close()
            return {"failure": f"took more than {MAX_SECONDS} s"}
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self.close()
            return {"failure": f"crashed with code {code}"}
        return json.loads(line)

    def close(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve():
    """Read paths from standard input, one a line, and answer each in a line; the reader's own process."""
    spec = importlib.util.spec_from_file_location("video_gve", READER)  # without the package, which loads torch
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints is taken for an answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, path, decoder = json.loads(line)
        limits = reader.MediaLimits(**LIMITS)
        try:
            if kind == "image":
                pixels, times = reader.load_image(path, limits)[None], np.zeros(1)
            else:
                pixels, times = reader.decode_video(path, 8, decoder, limits)
            answer = {"shape": pixels.shape if kind == "video" else pixels.shape[1:], "seconds": times[-1] - times[0]}
            height, width = pixels.shape[1:3]
            rows, columns = (height // 4, height * 3 // 4), (width // 4, width * 3 // 4)
            answer["corners"] = [[pixels[t, y, x].tolist() for y in rows for x in columns] for t in (0, -1)]
        except ValueError as error:
            answer = {"reason": str(error)}
        except Exception as error:  # an error of another class would end a batch job
            answer = {"failure": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="where to write the inputs; default a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()
    av.logging.set_level(None)
    reader, wrong = Reader(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases(arguments.seed):
            path = folder / case.name
            case.make(path)
            answer = reader(case.kind, path)
            fault = verdict(case, answer)
            wrong += fault is not None
            said = answer.get("reason") or answer.get("failure") or f"shape {answer['shape']}"
            print(f"{'WRONG' if fault else 'ok':5} {case.name}: {fault or said}".replace(f"{folder}/", ""), flush=True)
    reader.close()
    print(f"{wrong} of 200 wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
