// A picture to paint a mask on, by mouse, finger or pen, or by the arrow keys and Space.
// Knows pixels; does not depend on what the mask is for.

import { el } from "./dom.js";
import { image } from "./pictures.js";

const PAINT = "#c2410c";

export class Mask {
  /** url: of the picture; side: about how wide it is shown; brush(): the brush's radius in its pixels. */
  constructor(url, side, brush) {
    this.brush = brush;
    this.at = null; // where the keys are
    this.shown = image(url, "the picture to paint on", side);
    const label = "Paint over what is to be made anew: drag, or move by the arrow keys and paint with Space";
    this.canvas = el("canvas", { tabindex: 0, role: "application", "aria-label": label });
    this.ring = el("span", { class: "ring", hidden: true });
    this.element = el("span", { class: "canvas" }, this.shown, this.canvas, this.ring);
    this.shown.addEventListener("load", () => {
      [this.canvas.width, this.canvas.height] = [this.shown.naturalWidth, this.shown.naturalHeight];
    });
    let last = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.stroke((last = this.point(event)), last);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const next = this.point(event);
      this.stroke(last, next);
      last = next;
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (last = null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => (this.ring.hidden = true));
  }

  wipe() {
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** A PNG file: white where it was painted, black elsewhere. */
  async file() {
    const { width, height } = this.canvas;
    const made = el("canvas", { width, height });
    const context = made.getContext("2d");
    const lay = (how, colour) => {
      context.globalCompositeOperation = how;
      context.fillStyle = colour;
      context.fillRect(0, 0, width, height);
    };
    context.drawImage(this.canvas, 0, 0);
    lay("source-in", "white");
    lay("destination-over", "black");
    return new Promise((resolve) => made.toBlob(resolve, "image/png"));
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.canvas.width;
    return [x, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  stroke(from, to) {
    const context = this.canvas.getContext("2d");
    Object.assign(context, { lineWidth: 2 * this.brush(), strokeStyle: PAINT, fillStyle: PAINT });
    for (const end of [from, to]) {
      context.beginPath();
      context.arc(...end, this.brush(), 0, 2 * Math.PI); // its own, as a line without length is not drawn
      context.fill();
    }
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
  }

  key(event) {
    const { width, height } = this.canvas;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const [x, y] = this.at ?? [width / 2, height / 2];
    const step = this.brush();
    const within = (to, most) => Math.min(most, Math.max(0, to));
    this.at = [within(x + move[0] * step, width), within(y + move[1] * step, height)];
    if (event.key === " ") this.stroke(this.at, this.at);
    this.ring.hidden = false;
    const scale = this.canvas.clientWidth / width;
    const [left, top] = this.at.map((to) => `${(to - step) * scale}px`);
    Object.assign(this.ring.style, { left, top, width: `${2 * step * scale}px`, height: `${2 * step * scale}px` });
  }
}
