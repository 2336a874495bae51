// A video whose picture stays free: what a browser draws its own controls on is where the points are.

import { clock, el } from "./dom.js";

/** The video of a medium, and a row to play it and to go to a time. */
export function player(medium) {
  const video = el("video", { src: medium.url, muted: true, playsInline: true, preload: "auto", "aria-label": medium.name });
  const button = el("button", { type: "button", textContent: "Play" });
  const place = el("input", { type: "range", min: 0, max: 0, step: 0.01, value: 0, "aria-label": "Time in the video" });
  const time = el("time");
  const show = () => {
    if (document.activeElement !== place || !video.paused) place.value = video.currentTime;
    time.textContent = `${clock(video.currentTime)} / ${clock(video.duration || 0)}`;
    place.setAttribute("aria-valuetext", clock(video.currentTime));
  };
  video.addEventListener("loadedmetadata", () => {
    place.max = video.duration;
    show();
  });
  for (const event of ["timeupdate", "seeked"]) video.addEventListener(event, show);
  video.addEventListener("play", () => (button.textContent = "Pause"));
  video.addEventListener("pause", () => (button.textContent = "Play"));
  button.addEventListener("click", () => (video.paused ? video.play() : video.pause()));
  place.addEventListener("input", () => {
    video.pause();
    video.currentTime = place.valueAsNumber;
  });
  return { video, row: el("div", { className: "player" }, button, place, time) };
}
