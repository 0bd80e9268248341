// Mathematics of the pages: what `maps.py` computes, from the features that `page.py` stored.
const maps = (() => {
  "use strict";
  const UNIT = 32767; // features are int16 of value * UNIT

  function bytes(text) {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  }

  function features(text) {
    const stored = new DataView(bytes(text).buffer);
    return Int16Array.from({ length: stored.byteLength / 2 }, (_, index) => stored.getInt16(2 * index, true));
  }

  // The patch of a grid under a point, shares of height and width.
  function patchAt([rows, columns], { y, x }) {
    const row = Math.min(rows - 1, Math.floor(y * rows)), column = Math.min(columns - 1, Math.floor(x * columns));
    return { row, column, index: row * columns + column };
  }

  // Cosine of every patch with one. Products of integers are exact: the only error is that of storing.
  function cosines(stored, axes, prompt) {
    const found = new Float64Array(stored.length / axes);
    for (let patch = 0; patch < found.length; patch++) {
      let sum = 0;
      for (let axis = 0; axis < axes; axis++) sum += stored[patch * axes + axis] * stored[prompt * axes + axis];
      found[patch] = sum / (UNIT * UNIT);
    }
    return found;
  }

  // The two inputs around each output: torch's interpolate with align_corners=False, which aligns borders and holds the edge values.
  function neighbours(from, to) {
    return Array.from({ length: to }, (_, n) => {
      const place = Math.max(0, ((n + 0.5) * from) / to - 0.5), low = Math.floor(place);
      return { low, high: Math.min(from - 1, low + 1), share: place - low };
    });
  }

  // Bilinear, from a grid to pixels.
  function upsample(values, [rows, columns], [height, width]) {
    const across = neighbours(columns, width), pixels = new Float64Array(height * width);
    neighbours(rows, height).forEach((down, y) => {
      const upper = down.low * columns, lower = down.high * columns;
      across.forEach(({ low, high, share }, x) => {
        const top = values[upper + low] * (1 - share) + values[upper + high] * share;
        const bottom = values[lower + low] * (1 - share) + values[lower + high] * share;
        pixels[y * width + x] = top * (1 - down.share) + bottom * down.share;
      });
    });
    return pixels;
  }

  function range(values) {
    return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  }

  function count(values, condition) {
    return values.reduce((sum, value) => sum + (condition(value) ? 1 : 0), 0);
  }

  return { bytes, features, patchAt, cosines, upsample, range, count };
})();
