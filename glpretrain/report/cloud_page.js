// The page of clouds: every canvas shows one cloud in one backbone, all of them from the same side.
(() => {
  "use strict";
  const SIDE = 440, REACH = 1.15, NEIGHBOURS = 3, CLICK = 4; // pixels, coordinate at the edge, centres per point, pixels of a click
  const data = JSON.parse(document.getElementById("data").textContent);
  const colours = maps.bytes(data.colours), { element, plural, card } = drawing(colours);
  const by = (id) => document.getElementById(id);
  const state = { yaw: 0.6, pitch: 0.35, shown: "similarity", prompts: data.images.map(() => 0),
    thresholds: data.backbones.map((backbone) => backbone.threshold) };

  const clouds = data.images.map(({ points }) => new Float32Array(maps.bytes(points).buffer));

  function squared(points, a, b) {
    let sum = 0;
    for (let axis = 0; axis < 3; axis++) sum += (points[3 * a + axis] - points[3 * b + axis]) ** 2;
    return sum;
  }

  // The nearest centres of every point and how much each counts; of equally near ones the first.
  function nearest(points, centres) {
    return Array.from({ length: points.length / 3 }, (_, point) => {
      const found = centres.map((centre, token) => ({ token, distance: squared(points, point, centre) }));
      found.sort((a, b) => a.distance - b.distance || a.token - b.token);
      const kept = found.slice(0, NEIGHBOURS), weights = kept.map(({ distance }) => 1 / (distance + 1e-8));
      const total = weights.reduce((sum, weight) => sum + weight, 0);
      return kept.map(({ token }, n) => ({ token, weight: weights[n] / total }));
    });
  }

  const views = data.views.map((row, i) => row.map((view) => ({
    ...view,
    stored: maps.features(view.features),
    near: nearest(clouds[i], view.centres),
    shades: view.attention === null ? null : maps.bytes(view.attention),
  })));

  function atPoints(view, values) {
    return Float64Array.from(view.near, (parts) => parts.reduce((sum, { token, weight }) => sum + weight * values[token], 0));
  }

  function similarity(i, b) {
    const view = views[i][b], prompt = view.near[state.prompts[i]][0].token;
    return atPoints(view, maps.cosines(view.stored, view.axes, prompt));
  }

  // Values of the points, Float[P], their range, and what is said below them.
  function valuesOf(i, b) {
    const view = views[i][b];
    if (state.shown.startsWith("attention")) {
      if (view.shades === null) return { values: null, text: `no attention: ${view.reason}` };
      const [layer, head] = state.shown.split(" ").slice(1).map(Number), count = view.centres.length;
      if (!(layer < view.shades.length / (view.heads * count) && head < view.heads)) return { values: null, text: "no such block or head" };
      const start = (layer * view.heads + head) * count;
      return { values: atPoints(view, view.shades.subarray(start, start + count)), range: [0, 255], text: "attention of the class token" };
    }
    const values = similarity(i, b), range = maps.range(values);
    if (state.shown === "mask") {
      const share = maps.count(values, (value) => value > state.thresholds[b]) / values.length;
      return { values: values.map((value) => (value > state.thresholds[b] ? 1 : 0)), range: [0, 1], text: `${(100 * share).toFixed(1)} % of the points` };
    }
    return { values, range, text: `cosines from ${range[0].toFixed(3)} to ${range[1].toFixed(3)}` };
  }

  // Where every point stands on the canvas, and how near it is.
  function projected(points) {
    const [cy, sy, cp, sp] = [Math.cos(state.yaw), Math.sin(state.yaw), Math.cos(state.pitch), Math.sin(state.pitch)];
    const scale = SIDE / 2 / REACH, count = points.length / 3;
    const x = new Float32Array(count), y = new Float32Array(count), depth = new Float32Array(count);
    for (let n = 0; n < count; n++) {
      const [a, b, c] = [points[3 * n], points[3 * n + 1], points[3 * n + 2]];
      const across = cy * a - sy * b, along = sy * a + cy * b;
      x[n] = SIDE / 2 + scale * across;
      y[n] = SIDE / 2 - scale * (cp * c - sp * along);
      depth[n] = -(sp * c + cp * along);
    }
    return { x, y, depth };
  }

  function draw(cell) {
    const { i, canvas, values, range } = cell, context = canvas.getContext("2d"), { x, y, depth } = projected(clouds[i]);
    context.clearRect(0, 0, SIDE, SIDE);
    const order = Array.from(x, (_, n) => n).sort((a, b) => depth[a] - depth[b]);
    for (const n of order) {
      const share = values === null ? 0.5 : Math.min(1, Math.max(0, (values[n] - range[0]) / Math.max(range[1] - range[0], 1e-12)));
      const at = 3 * Math.round(255 * share), size = 4.5 + 1.5 * depth[n];
      context.fillStyle = values === null ? "#777" : `rgb(${colours[at]},${colours[at + 1]},${colours[at + 2]})`;
      context.fillRect(x[n] - size / 2, y[n] - size / 2, size, size);
    }
    const prompt = state.prompts[i];
    Object.assign(context, { strokeStyle: "#ff2d6f", lineWidth: 2.5 });
    context.beginPath();
    context.arc(x[prompt], y[prompt], 9, 0, 2 * Math.PI);
    context.stroke();
  }

  const cells = [];
  const drawAll = () => cells.forEach(draw);

  function update() {
    for (const cell of cells) {
      Object.assign(cell, valuesOf(cell.i, cell.b));
      cell.caption.textContent = cell.text;
    }
    by("value").textContent = [...new Set(state.thresholds.map((value) => value.toFixed(2)))].join(", ");
    drawAll();
  }

  // The nearest point on the canvas, of those in front where several are as near.
  function pointAt(i, place) {
    const { x, y, depth } = projected(clouds[i]);
    let best = 0, least = Infinity;
    for (let n = 0; n < x.length; n++) {
      const distance = (x[n] - place.x) ** 2 + (y[n] - place.y) ** 2 - 40 * depth[n];
      if (distance < least) [best, least] = [n, distance];
    }
    return best;
  }

  function turn(yaw, pitch) {
    state.yaw += yaw;
    state.pitch = Math.min(1.5, Math.max(-1.5, state.pitch + pitch));
    drawAll();
  }

  function listen(cell) {
    const { canvas, i } = cell;
    let from = null, moved = 0;
    canvas.addEventListener("pointerdown", (event) => {
      from = { x: event.clientX, y: event.clientY };
      moved = 0;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (from === null) return;
      const [across, down] = [event.clientX - from.x, event.clientY - from.y];
      moved += Math.abs(across) + Math.abs(down);
      if (moved > CLICK) {
        by("turning").checked = false;
        turn(0.01 * across, 0.01 * down);
      }
      from = { x: event.clientX, y: event.clientY };
    });
    canvas.addEventListener("pointerup", (event) => {
      if (from !== null && moved <= CLICK) {
        const box = canvas.getBoundingClientRect(), scale = SIDE / box.width;
        state.prompts[i] = pointAt(i, { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale });
        update();
      }
      from = null;
    });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      by("turning").checked = false;
      turn(...step);
    });
  }

  function build() {
    by("lead").textContent = `${plural(data.images.length, "cloud")}, ${plural(data.backbones.length, "backbone")}. `
      + "Click a point to prompt, drag to turn.";
    by("version").textContent = `made by glpretrain ${data.version}`;
    const error = Math.max(...data.views.flat().map((view) => view.error));
    by("exactness").textContent = `Features are stored as 16-bit integers: the largest error of any cosine on this page is ${error.toExponential(1)}.`;
    by("cards").append(...data.backbones.map((backbone) => card(backbone, {})));
    const options = [["similarity", "similarity"], ["mask", "mask"]];
    const layers = data.backbones[0].layers, heads = Math.max(0, ...data.views.flat().map((view) => view.heads ?? 0));
    layers.forEach((layer, n) => {
      for (let head = 0; head < heads; head++) options.push([`attention ${n} ${head}`, `attention, block ${layer}, head ${head}`]);
    });
    by("shown").append(...options.map(([value, text]) => new Option(text, value)));
    data.images.forEach(({ name }, i) => {
      const columns = element("div", { className: "columns" });
      data.backbones.forEach((backbone, b) => {
        const attributes = { "aria-label": `${name} in ${backbone.name}` };
        const canvas = element("canvas", { width: SIDE, height: SIDE, tabIndex: 0, attributes }), caption = element("figcaption");
        const figure = element("figure", { className: "cloud" }, canvas, caption);
        columns.append(element("section", { className: "backbone" }, element("h3", { textContent: backbone.name }), figure));
        const cell = { i, b, canvas, caption, values: null, range: [0, 1], text: "" };
        cells.push(cell);
        listen(cell);
      });
      by("main").append(element("section", { className: "image" }, element("h2", { textContent: name }), columns));
    });
    by("threshold").value = state.thresholds.at(-1);
    by("threshold").addEventListener("input", (event) => { state.thresholds.fill(Number(event.target.value)); update(); });
    by("shown").addEventListener("change", (event) => { state.shown = event.target.value; update(); });
    update();
    let last = null;
    const step = (now) => {
      if (by("turning").checked && last !== null) turn(0.0004 * Math.min(100, now - last), 0);
      last = now;
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  build();
  // For tests and for the console.
  window.glpretrainClouds = Object.freeze({
    mask: (i, b) => Array.from(similarity(i, b), (value) => value > state.thresholds[b]),
    similarity: (i, b) => Array.from(similarity(i, b)),
    prompt: (i) => state.prompts[i],
    setPrompt: (i, point) => { state.prompts[i] = point; update(); },
    side: () => [state.yaw, state.pitch],
    place: (i, point) => { const { x, y } = projected(clouds[i]); return [x[point] / SIDE, y[point] / SIDE]; },
  });
})();
