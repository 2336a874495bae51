// Pictures and videos as they were chosen: nothing is made smaller. Only drawings (SVG) become pixels, since models read nothing else.

import { el } from "./dom.js";

const KINDS = { jpg: "image/jpeg", jpeg: "image/jpeg", png: "image/png", webp: "image/webp", gif: "image/gif", bmp: "image/bmp",
  tif: "image/tiff", tiff: "image/tiff", heic: "image/heic", avif: "image/avif", svg: "image/svg+xml",
  mp4: "video/mp4", m4v: "video/mp4", webm: "video/webm", mov: "video/quicktime", mkv: "video/x-matroska", avi: "video/x-msvideo" };

/** A chosen file: `kind` "image" or "video", `blob` what is sent, `url` for showing it here. */
export class Medium {
  constructor(name, blob) {
    this.name = name;
    this.blob = blob;
    this.kind = blob.type.split("/")[0];
    this.url = URL.createObjectURL(blob);
  }

  /** The part of a message that carries it. */
  async part() {
    this.data ??= read(this.blob);
    const type = `${this.kind}_url`;
    return { type, [type]: { url: await this.data } };
  }

  /** An element that shows it small, or `instead` (a text) where this browser cannot show it. */
  thumbnail(instead) {
    const node =
      this.kind === "video"
        ? el("video", { src: this.url, className: "thumbnail", muted: true, preload: "metadata", playsInline: true })
        : el("img", { src: this.url, className: "thumbnail", alt: this.name });
    node.addEventListener("error", () => node.replaceWith(el("span", { className: "thumbnail unseen", textContent: instead })));
    return node;
  }
}

/**
 * @param {Blob} blob a file, or the data of one
 * @param {string} name
 * @throws {Error} neither a picture nor a video; the message says so
 */
export async function medium(blob, name) {
  const type = blob.type || KINDS[name.split(".").pop().toLowerCase()] || "";
  if (!/^(image|video)\//.test(type)) throw new Error(`${name} is neither a picture nor a video.`);
  if (type === "image/svg+xml") return new Medium(name.replace(/\.svg$/i, "") + ".png", await drawn(blob));
  return new Medium(name, blob.type ? blob : new Blob([blob], { type }));
}

async function drawn(svg) {
  const image = new Image();
  image.src = URL.createObjectURL(svg);
  await image.decode().catch(() => {
    throw new Error("This drawing cannot be read.");
  });
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  canvas.getContext("2d").drawImage(image, 0, 0);
  URL.revokeObjectURL(image.src);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function read(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file can no longer be read. Was it moved or changed?"));
    reader.readAsDataURL(blob);
  });
}
