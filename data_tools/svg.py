"""Drawing SVG pictures."""

import io

from PIL import Image

from mmpre.data_tools.packages import PackageMissingError


def draw_png(svg: str, side_px: int) -> bytes:
    """The picture as PNG, its longer side `side_px`. Raises ValueError for what is no picture."""
    try:
        import resvg_py
    except ImportError:
        raise PackageMissingError("SVG pictures are drawn by resvg-py; get it with `pip install resvg-py`") from None
    # with the default of 0 dots per inch, sizes in millimetres or points are refused; fonts differ between machines
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side_px, height=side_px, dpi=96, skip_system_fonts=True))


def draw(svg: str, side_px: int) -> Image.Image:
    return Image.open(io.BytesIO(draw_png(svg, side_px))).convert("RGBA")
