"""The old name of generate_codes.py, with the new one in its error."""

raise SystemExit(
    "unigen: error: data_tools/draw_again.py is data_tools/generate_codes.py now, and --kept is --fixed-scales"
)
