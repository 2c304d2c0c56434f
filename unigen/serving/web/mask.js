// An image to paint a mask on, by mouse, finger or pen, or by the arrow keys and Space.
// Does not depend on: what the mask is for.

import { el } from "./dom.js";
import { imageElement } from "./images.js";

const BRUSH_COLOR = "#c2410c";

/** A canvas over an image; `element` contains both. */
export class MaskCanvas {
  /**
   * @param {string} url of the image
   * @param {number} size width at which it is shown, in CSS pixels
   * @param {() => number} brushRadius in pixels of the image
   */
  constructor(url, size, brushRadius) {
    this.url = url;
    this.brushRadius = brushRadius;
    this.cursor = null; // [x, y] of the keyboard brush
    this.image = imageElement(url, "the picture to paint on", size);
    const label = "Paint over the area to redraw: drag, or move with the arrow keys and paint with Space";
    this.canvas = el("canvas", { tabindex: 0, role: "application", "aria-label": label });
    this.brushRing = el("span", { class: "brush-ring", hidden: true });
    this.element = el("span", { class: "mask-canvas" }, this.image, this.canvas, this.brushRing);
    this.image.addEventListener("load", () => {
      [this.canvas.width, this.canvas.height] = [this.image.naturalWidth, this.image.naturalHeight];
    });
    this.addListeners();
  }

  addListeners() {
    let last = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      last = this.toImagePoint(event);
      this.drawStroke(last, last);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const next = this.toImagePoint(event);
      this.drawStroke(last, next);
      last = next;
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (last = null));
    this.canvas.addEventListener("keydown", (event) => this.onKeyDown(event));
    this.canvas.addEventListener("blur", () => (this.brushRing.hidden = true));
  }

  clear() {
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /**
   * The mask as a PNG file: white where it was painted, black elsewhere.
   * @returns {Promise<Blob>}
   */
  async toFile() {
    const { width, height } = this.canvas;
    const canvas = el("canvas", { width, height });
    const context = canvas.getContext("2d");
    const fill = (operation, color) => {
      context.globalCompositeOperation = operation;
      context.fillStyle = color;
      context.fillRect(0, 0, width, height);
    };
    context.drawImage(this.canvas, 0, 0);
    fill("source-in", "white");
    fill("destination-over", "black");
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  /** [x, y] of a pointer event, in pixels of the image. */
  toImagePoint(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.canvas.width;
    return [x, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  drawStroke(start, end) {
    const context = this.canvas.getContext("2d");
    const radius = this.brushRadius();
    Object.assign(context, { lineWidth: 2 * radius, strokeStyle: BRUSH_COLOR, fillStyle: BRUSH_COLOR });
    for (const point of [start, end]) {
      context.beginPath();
      context.arc(...point, radius, 0, 2 * Math.PI); // a line of length 0 draws nothing
      context.fill();
    }
    context.beginPath();
    context.moveTo(...start);
    context.lineTo(...end);
    context.stroke();
  }

  onKeyDown(event) {
    const { width, height } = this.canvas;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const [x, y] = this.cursor ?? [width / 2, height / 2];
    const radius = this.brushRadius();
    const clamp = (value, max) => Math.min(max, Math.max(0, value));
    this.cursor = [clamp(x + move[0] * radius, width), clamp(y + move[1] * radius, height)];
    if (event.key === " ") this.drawStroke(this.cursor, this.cursor);
    this.brushRing.hidden = false;
    const scale = this.canvas.clientWidth / width;
    const [left, top] = this.cursor.map((value) => `${(value - radius) * scale}px`);
    const diameter = `${2 * radius * scale}px`;
    Object.assign(this.brushRing.style, { left, top, width: diameter, height: diameter });
  }
}
