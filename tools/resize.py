"""A copy of a data set that is quick to decode: videos and images with a shorter side of 256.

    python -m tools.resize SRC DST --short-side 256

A video becomes H.264 with a key frame every 16 frames, upright, without sound. The times of its
frames stay. An image keeps its format. Nothing is enlarged. Every file keeps its name, so that
lists still fit: clip.webm then holds an MP4, which FFmpeg tells by the content. Lists and label
maps (csv, txt, tsv, json, pt) are copied, and a csv with paths into SRC then leads into DST.
A copy that was killed goes on when it is started again. A file that cannot be read to its end is
named and left out. The exit status is 1 then.
"""
import argparse
import io
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import engine  # isort: skip (before torch)
import av
import numpy as np
from PIL import Image
from tqdm import tqdm

import layouts
import video

COPIED = (".csv", ".txt", ".tsv", ".json", ".pt")
# Without B-frames the order in the file is that of the times, and the last duration is exact.
X264 = {"crf": "20", "preset": "veryfast", "g": "16", "bf": "0"}


def small_video(path, short_side, counted=False):
    """The bytes of an MP4. counted: frame k is at k / frame rate, for files whose frames carry no
    usable times. Returns None if it should be counted. Raises video.UnreadableFile."""
    file, last, encoder = io.BytesIO(), None, None
    with video.open_video(path) as (container, stream), av.open(file, "w", format="mp4") as output:
        rate = Fraction(video.frame_rate(stream)).limit_denominator(1001)
        unit = 1 / rate if counted else stream.time_base
        promised, lengths = float((stream.duration or 0) * stream.time_base), {}
        for count, frame in enumerate(container.decode(stream)):
            time = count if counted else frame.pts
            if time is None or last is not None and time < last:
                return None
            if time == last:
                continue
            pixels = video.to_rgb(frame, min(short_side, frame.height, frame.width))
            H, W = (side // 2 * 2 for side in pixels.shape[1:])               # as H.264 needs
            pixels = np.ascontiguousarray(pixels[:, :H, :W].transpose(1, 2, 0))
            if encoder is None:
                encoder, first = output.add_stream("libx264", rate, X264), time
                encoder.height, encoder.width, encoder.pix_fmt = H, W, "yuv420p"
                encoder.codec_context.time_base = unit
                encoder.codec_context.thread_count = 1         # the same bytes on any machine
            if (H, W) != (encoder.height, encoder.width):
                raise video.UnreadableFile(path, "the picture changes its shape")
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base, last = time - first, unit, time
            lengths[picture.pts] = 1 if counted else frame.duration or 0
            mux(output, encoder.encode(picture), lengths)
        if encoder is None:
            raise video.UnreadableFile(path, "no frame decodes")
        seconds = float((last - first + lengths[last - first]) * unit)
        if promised > seconds + video.MAY_LACK:
            raise video.UnreadableFile(path, f"cut off: {seconds:.2f} s decode, not {promised:.2f}")
        mux(output, encoder.encode(), lengths)
    return file.getvalue()


def mux(output, packets, lengths):
    for packet in packets:
        packet.duration = lengths[packet.pts]
        output.mux(packet)


def small_image(path, short_side):
    """The bytes of an image file. Raises video.UnreadableFile."""
    image, file = video.read_image(path), io.BytesIO()
    scale = short_side / min(image.size)
    if scale >= 1:
        with open(path, "rb") as source:
            return source.read()
    kind = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    size = [round(side * scale) for side in image.size]
    image.resize(size, Image.BICUBIC).save(file, kind, quality=95)
    return file.getvalue()


def convert(job):
    """Writes one file of the copy. Returns what stops it, or None."""
    name, source, target, short_side = job
    path, result = os.path.join(source, name), os.path.join(target, name)
    try:
        if kind := layouts.media_kind(path):
            read = small_image if kind == "image" else small_video
            content = read(path, short_side) or small_video(path, short_side, counted=True)
        else:
            with open(path, "rb") as file:
                content = file.read()
            if name.lower().endswith(".csv"):
                content = content.replace(os.fsencode(source + "/"), os.fsencode(target + "/"))
    except video.UnreadableFile as error:
        return error.reason
    os.makedirs(os.path.dirname(result), exist_ok=True)
    with open(result + ".part", "wb") as file:  # no media by its name, and replaced if left behind
        file.write(content)
    os.replace(result + ".part", result)
    return None


def end_with_parent():
    """A process of a pool would wait for ever if its parent is killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def resize(source, target, short_side, workers):
    """Copies a data set. Returns the number of files left out. Raises ValueError, OSError."""
    source, target = os.path.abspath(source), os.path.abspath(target)
    if not os.path.isdir(source):
        raise FileNotFoundError(f"no data folder {source}")
    roots = [os.path.realpath(root) for root in (source, target)]
    if os.path.commonpath(roots) in roots:      # nothing is written into the source
        raise ValueError(f"{target} and {source} lie in each other: choose another folder to write")
    if short_side < 16:
        raise ValueError(f"--short-side {short_side} is below 16: use more")
    if "libx264" not in av.codecs_available:
        raise ValueError("this PyAV cannot write H.264: install its wheel (pip install av)")
    mark, made_from = Path(target, ".resized"), os.fsencode(f"{source}\n{short_side}\n")
    mark.parent.mkdir(parents=True, exist_ok=True)
    if os.listdir(target) and not (mark.exists() and mark.read_bytes() == made_from):
        raise ValueError(f"{target} holds other files than those of {source} at {short_side}: "
                         "choose another folder, or remove it")
    mark.write_bytes(made_from)
    media, others = layouts.walk(source)
    names = [os.path.relpath(path, source) for path in
             media + [path for path in others if path.lower().endswith(COPIED)]]
    jobs = [(name, source, target, short_side) for name in names
            if not os.path.exists(os.path.join(target, name))]
    left_out = 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"),
                             end_with_parent) as pool:
        bar = tqdm(pool.map(convert, jobs), initial=len(names) - len(jobs), total=len(names),
                   unit="file", disable=None)           # None: only on a terminal
        for reason, (name, *_) in zip(bar, jobs):
            if reason:
                left_out += 1
                tqdm.write(f"left out  {os.path.join(source, name)}: {reason}")
    print(f"{len(names) - left_out} files in {target}, {left_out} left out")
    return left_out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--short-side", type=int, default=256, help="pixels [256]")
    parser.add_argument("--workers", type=int, default=engine.usable_cores(),
                        help="processes [one per core]")
    flags = parser.parse_args()
    sys.exit(int(resize(flags.source, flags.target, flags.short_side, flags.workers) > 0))


if __name__ == "__main__":
    engine.run_main(main)
