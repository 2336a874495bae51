// Points of an answer, drawn where they are: on the picture, or on the video at their time.

import { clock, counted, el } from "./dom.js";
import { player } from "./player.js";

const NEAR_S = 0.25; // a point is shown while the video is this near to its time
const LISTED = 12; // more points than these are folded away

/** A picture or a video with points on it, and a list of them. Points come as the answer is generated. */
export class Marked {
  constructor(medium) {
    this.points = [];
    this.video = medium.kind === "video";
    const { video, row = null } = this.video ? player(medium) : {};
    this.view = video ?? el("img", { src: medium.url, alt: medium.name });
    this.stage = el("div", { className: "stage" }, this.video ? this.view : this.enlarging());
    this.count = el("summary");
    this.list = el("ol");
    this.details = el("details", { className: "points", open: true }, this.count, this.list);
    this.element = el("figure", { className: "marked" }, this.stage, row, this.details);
    this.view.addEventListener(this.video ? "loadedmetadata" : "load", () => this.measured());
    this.view.addEventListener("error", () => this.element.classList.add("unseen"));
    for (const event of ["timeupdate", "seeked", "play"]) this.view.addEventListener(event, () => this.follow());
  }

  /** @param {{x: number, y: number, label: ?string, t: ?number}} point x and y in pixels of the picture */
  add(point) {
    const number = this.points.length + 1;
    const marker = el("span", { className: "marker", "aria-hidden": "true" });
    const at = `${round(point.x)}, ${round(point.y)}`;
    const when = point.t === null || point.t === undefined ? null : clock(point.t);
    const entry = el(
      "button",
      { type: "button", title: `x ${point.x}, y ${point.y} pixels` },
      el("b", { textContent: number }),
      when && el("time", { textContent: when }),
      point.label && el("span", { textContent: point.label }),
      el("small", { textContent: at }),
    );
    const emphasise = (on) => marker.classList.toggle("chosen", on);
    for (const [event, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]])
      entry.addEventListener(event, () => emphasise(on));
    entry.addEventListener("click", () => this.seek(point.t));
    this.points.push({ ...point, marker });
    this.stage.append(marker);
    this.list.append(el("li", {}, entry));
    this.count.textContent = counted(number, "point");
    if (number === LISTED + 1) this.details.open = false;
    this.stage.classList.toggle("several", number > 1);
    marker.textContent = number;
    this.place();
    if (number === 1) this.seek(point.t);
    this.follow();
  }

  /** The picture as a button that makes it as large as the window, and small again (Esc, too). */
  enlarging() {
    const button = el("button", { type: "button", "aria-label": `Enlarge ${this.view.alt}`, "aria-pressed": "false" }, this.view);
    const enlarge = (on) => button.setAttribute("aria-pressed", this.stage.classList.toggle("large", on));
    button.addEventListener("click", () => enlarge());
    button.addEventListener("blur", () => enlarge(false));
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.stage.classList.contains("large")) return;
      event.preventDefault();
      enlarge(false);
    });
    return button;
  }

  measured() {
    this.width = this.video ? this.view.videoWidth : this.view.naturalWidth;
    this.height = this.video ? this.view.videoHeight : this.view.naturalHeight;
    this.stage.style.setProperty("--width", this.width);
    this.stage.style.setProperty("--height", this.height);
    this.stage.classList.toggle("coarse", this.width < 200);
    this.place();
  }

  place() {
    if (!this.width) return;
    for (const { marker, x, y } of this.points) {
      marker.style.left = `${(100 * x) / this.width}%`;
      marker.style.top = `${(100 * y) / this.height}%`;
    }
  }

  /** Shows the frame of a time. */
  seek(time) {
    if (!this.video || time === null || time === undefined) return;
    this.view.pause();
    this.view.currentTime = time;
  }

  /** Shows the points of the frame that is to be seen, and no others. */
  follow() {
    if (!this.video) return;
    const now = this.view.currentTime;
    const times = this.points.map(({ t }) => t).filter((t) => t !== null && t !== undefined);
    const nearest = times.reduce((best, t) => (Math.abs(t - now) < Math.abs(best - now) ? t : best), Infinity);
    for (const { marker, t } of this.points) marker.hidden = !(t === nearest && Math.abs(t - now) < NEAR_S);
  }
}

const round = (value) => Number(value.toFixed(value < 100 ? 1 : 0));
