// Elements and canvases of the page. Everything that is drawn comes as an argument; what there is to draw, `page.js` knows.
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

  // A canvas of one pixel per value; `colourOf(n)` gives its red, green and blue.
  function painted([height, width], colourOf) {
    const canvas = element("canvas", { width, height }), context = canvas.getContext("2d");
    const picture = context.createImageData(width, height);
    for (let n = 0; n < height * width; n++) {
      const [red, green, blue] = colourOf(n);
      picture.data[4 * n] = red;
      picture.data[4 * n + 1] = green;
      picture.data[4 * n + 2] = blue;
      picture.data[4 * n + 3] = 255;
    }
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

  function colour(value, [low, high]) {
    const shade = Math.round(Math.min(1, Math.max(0, (value - low) / Math.max(high - low, 1e-12))) * 255);
    return colours.subarray(3 * shade, 3 * shade + 3);
  }

  const greyOf = (rgba, n) => (rgba[4 * n] + rgba[4 * n + 1] + rgba[4 * n + 2]) / 3;

  // Values over the grey picture.
  function heat(size, rgba, values, range, opacity) {
    return painted(size, (n) => {
      const grey = (1 - opacity) * greyOf(rgba, n), [red, green, blue] = colour(values[n], range);
      return [grey + opacity * red, grey + opacity * green, grey + opacity * blue];
    });
  }

  // The picture inside the mask, dim and grey outside, enlarged, with the border of the mask.
  function cutOut([height, width], rgba, mask, { dimmed, drawn, line }) {
    const canvas = enlarged(painted([height, width], (n) => {
      const grey = dimmed * greyOf(rgba, n);
      return mask[n] ? rgba.subarray(4 * n, 4 * n + 3) : [grey, grey, grey];
    }), drawn);
    const context = canvas.getContext("2d"), down = drawn[0] / height, across = drawn[1] / width;
    const edge = (x0, y0, x1, y1) => { context.moveTo(x0 * across, y0 * down); context.lineTo(x1 * across, y1 * down); };
    context.beginPath();
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const n = y * width + x;
        if (x + 1 < width && mask[n] !== mask[n + 1]) edge(x + 1, y, x + 1, y + 1);
        if (y + 1 < height && mask[n] !== mask[n + width]) edge(x, y + 1, x + 1, y + 1);
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
      context.fillStyle = `rgb(${colour(middle, range).join(",")})`;
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

  return { element, painted, enlarged, colour, heat, cutOut, histogram, frame };
};
