// Elements and canvases of the pages. Everything that is drawn comes as an argument; `image_page.js` and `cloud_page.js` know what there is to draw.
const drawing = (colours) => { // 256 * RGB
  "use strict";
  const OUTLINE = "#ff2d6f";
  const BINS = 80;

  function element(tag, properties = {}, ...children) {
    const { attributes = {}, ...own } = properties;
    const made = Object.assign(document.createElement(tag), own);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

  // What a backbone is, in a card at the top of the page; facts that are empty are left out.
  function card(backbone, facts) {
    const common = {
      encoder: backbone.encoder, source: backbone.source, licence: backbone.licence,
      parameters: `${(backbone.parameters / 1e6).toPrecision(3)} M`, width: `${backbone.dim}, ${backbone.depth} blocks`, ...facts,
      threshold: `opens at ${backbone.threshold.toFixed(3)}, ${backbone.origin}`,
    };
    const list = element("dl");
    for (const [name, value] of Object.entries(common)) {
      if (value) list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
    }
    return element("div", { className: "card" }, element("h3", { textContent: backbone.name }), list);
  }

  // A colour in one number, as a canvas keeps it on a little-endian machine: pictures are redrawn while a slider moves.
  const packed = (red, green, blue) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

  // A canvas of one pixel per value; `colourOf(n)` gives its packed colour.
  function painted([height, width], colourOf) {
    const canvas = element("canvas", { width, height }), context = canvas.getContext("2d");
    const picture = context.createImageData(width, height), pixels = new Uint32Array(picture.data.buffer);
    for (let n = 0; n < pixels.length; n++) pixels[n] = colourOf(n);
    context.putImageData(picture, 0, 0);
    return canvas;
  }

  // The same picture larger, every pixel a block.
  function enlarged(source, [height, width]) {
    const canvas = element("canvas", { width, height }), context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(source, 0, 0, width, height);
    return canvas;
  }

  // Where a value's red starts in `colours`.
  function shade(value, low, high) {
    return 3 * Math.round(Math.min(1, Math.max(0, (value - low) / Math.max(high - low, 1e-12))) * 255);
  }

  function colour(value, [low, high]) {
    const at = shade(value, low, high);
    return packed(colours[at], colours[at + 1], colours[at + 2]);
  }

  // Of a picture's pixels: each one's brightness.
  function greys(rgba) {
    return Float32Array.from({ length: rgba.length / 4 }, (_, n) => (rgba[4 * n] + rgba[4 * n + 1] + rgba[4 * n + 2]) / 3);
  }

  // Values over the grey picture.
  function heat(size, grey, values, [low, high], opacity) {
    return painted(size, (n) => {
      const at = shade(values[n], low, high), under = (1 - opacity) * grey[n];
      return packed(under + opacity * colours[at], under + opacity * colours[at + 1], under + opacity * colours[at + 2]);
    });
  }

  // The picture inside the mask, dim and grey outside, enlarged, with the border of the mask.
  function cutOut([height, width], rgba, grey, mask, { dimmed, drawn, line }) {
    const canvas = enlarged(painted([height, width], (n) => {
      const under = dimmed * grey[n];
      return mask[n] ? packed(rgba[4 * n], rgba[4 * n + 1], rgba[4 * n + 2]) : packed(under, under, under);
    }), drawn);
    const context = canvas.getContext("2d"), down = drawn[0] / height, across = drawn[1] / width;
    const edge = (x, y, right, lower) => { // from a corner of pixels to the next
      context.moveTo(x * across, y * down);
      context.lineTo((x + right) * across, (y + lower) * down);
    };
    context.beginPath();
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const n = y * width + x;
        if (x + 1 < width && mask[n] !== mask[n + 1]) edge(x + 1, y, 0, 1);
        if (y + 1 < height && mask[n] !== mask[n + width]) edge(x, y + 1, 1, 0);
      }
    }
    Object.assign(context, { strokeStyle: OUTLINE, lineWidth: line, lineCap: "square" });
    context.stroke();
    return canvas;
  }

  // Counts of values between `low` and `high`, in the colours of `range`, pale up to the threshold.
  function histogram(canvas, values, { low, high, range, threshold }) {
    const context = canvas.getContext("2d"), { width, height } = canvas;
    const share = (value) => (value - low) / (high - low), counts = new Array(BINS).fill(0);
    for (const value of values) counts[Math.min(BINS - 1, Math.max(0, Math.floor(share(value) * BINS)))]++;
    const tallest = Math.sqrt(Math.max(...counts));
    context.clearRect(0, 0, width, height);
    counts.forEach((count, bin) => {
      const middle = low + ((bin + 0.5) / BINS) * (high - low), bar = (Math.sqrt(count) / tallest) * (height - 6);
      context.globalAlpha = middle > threshold ? 1 : 0.5;
      const at = shade(middle, ...range);
      context.fillStyle = `rgb(${colours.subarray(at, at + 3).join(",")})`;
      context.fillRect((bin / BINS) * width + 1, height - bar, width / BINS - 2, bar);
    });
    context.globalAlpha = 1;
    context.fillStyle = OUTLINE;
    context.fillRect(Math.min(width - 4, Math.max(0, share(threshold) * width - 2)), 0, 4, height);
  }

  // A frame around one patch of a grid that fills the canvas.
  function frame(canvas, [rows, columns], { row, column }, strokes) {
    const context = canvas.getContext("2d"), height = canvas.height / rows, width = canvas.width / columns;
    for (const [strokeStyle, lineWidth] of strokes) {
      Object.assign(context, { strokeStyle, lineWidth });
      context.strokeRect(column * width, row * height, width, height);
    }
  }

  return { element, plural, card, packed, painted, enlarged, colour, greys, heat, cutOut, histogram, frame };
};
