// The map of items, their neighbours, and what there is to act on. Pictures come from one sheet; cosines and places were computed before.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent), { items, sheet, classes } = data;
  const { element } = drawing(maps.bytes(data.colours));
  const by = (id) => document.getElementById(id), count = items.length;
  const HUES = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#99ddff", "#aaaa00"]; // Tol's
  const PAD = 34, CLICK = 5, DEEPEST = 40, LEAST = 16, MOST = 190; // pixels around the map, of a click, largest zoom, pixels of a picture
  const STEP = 1.5, GLIDE = 450, VEIL = 0.45; // zoom of a button, milliseconds from one map to the other, over what is not chosen
  const coloured = classes.length > 1 && classes.length <= HUES.length;

  const unpacked = (text) => new Uint16Array(maps.bytes(text).buffer);
  const moments = Object.fromEntries(Object.entries(data.moments).map(([name, one]) => [name, {
    places: Float32Array.from(unpacked(one.places), (value) => value / 65535),
    neighbours: unpacked(one.neighbours), cosines: unpacked(one.cosines), k: one.k,
  }]));
  const state = { moment: "after", from: null, since: 0, zoom: 1, x: 0, y: 0, chosen: null, hovered: null };
  const canvas = by("map-canvas"), picture = new Image();
  let size = [0, 0], scheduled = false;

  // ---- pictures

  // Where the picture of an item is in the sheet.
  function cell(n) {
    const [width, height] = sheet.sizes[n];
    return { x: (n % sheet.columns) * sheet.side, y: Math.floor(n / sheet.columns) * sheet.side, width, height };
  }

  // The picture of an item, whole, or its middle square.
  function drawn(n, { square }) {
    const { x, y, width, height } = cell(n), side = Math.min(width, height);
    const [across, down] = square ? [side, side] : [width, height];
    const made = element("canvas", { width: across, height: down, attributes: { role: "img", "aria-label": items[n].name } });
    made.getContext("2d").drawImage(picture, x + (width - across) / 2, y + (height - down) / 2, across, down, 0, 0, across, down);
    return made;
  }

  function thumb(n, text, { scroll = false } = {}) {
    const title = classes.length && items[n].label >= 0 ? `${items[n].name} (${classes[items[n].label]})` : items[n].name;
    const caption = element("small", { textContent: text });
    const button = element("button", { type: "button", className: "thumb", title }, drawn(n, { square: true }), caption);
    button.addEventListener("click", () => choose(n, { scroll, centre: true }));
    return button;
  }

  function nearest(name, n, most) {
    const { neighbours, cosines, k } = moments[name];
    return Array.from({ length: Math.min(most, k) }, (_, place) => {
      const at = n * k + place;
      return { item: neighbours[at], cosine: cosines[at] / 32767 - 1 };
    });
  }

  function row(name, n, most) {
    return element("div", { className: "thumbs" }, ...nearest(name, n, most).map(({ item, cosine }) => thumb(item, cosine.toFixed(3))));
  }

  // ---- the map

  const eased = (share) => share * share * (3 - 2 * share);

  // Where an item is on the canvas, in pixels of the page.
  function place(n) {
    const { places } = moments[state.moment], share = state.from === null ? 1 : eased(Math.min(1, (performance.now() - state.since) / GLIDE));
    const old = state.from === null ? places : moments[state.from].places;
    const [across, down] = [0, 1].map((axis) => {
      const value = places[2 * n + axis] * share + old[2 * n + axis] * (1 - share);
      return PAD + value * (size[axis] - 2 * PAD);
    });
    return [(across - size[0] / 2) * state.zoom + size[0] / 2 + state.x, (down - size[1] / 2) * state.zoom + size[1] / 2 + state.y];
  }

  const sideOf = () => Math.min(MOST, Math.max(LEAST, 0.8 * Math.sqrt((size[0] * size[1]) / count) * state.zoom ** 0.7));

  function box(n, side) {
    const [x, y] = place(n), { width, height } = cell(n), scale = side / Math.max(width, height);
    return { x: x - (width * scale) / 2, y: y - (height * scale) / 2, width: width * scale, height: height * scale };
  }

  function paint() {
    scheduled = false;
    const context = canvas.getContext("2d"), dense = window.devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
    const [ink, accent, outline, ground] = ["--ink", "--accent", "--outline", "--card"].map((name) => style.getPropertyValue(name).trim());
    context.setTransform(dense, 0, 0, dense, 0, 0);
    context.clearRect(0, 0, ...size);
    context.imageSmoothingQuality = "high";
    const side = sideOf(), friends = new Set(state.chosen === null ? [] : nearest(state.moment, state.chosen, Infinity).map(({ item }) => item));
    const above = (n) => (n === state.hovered ? 3 : n === state.chosen ? 2 : friends.has(n) ? 1 : 0);
    const order = Array.from({ length: count }, (_, n) => n).sort((a, b) => above(a) - above(b));
    const frame = ({ x, y, width, height }, colour, line) => {
      Object.assign(context, { strokeStyle: colour, lineWidth: line });
      context.strokeRect(x - line / 2, y - line / 2, width + line, height + line);
    };
    const single = (n) => {
      const { x, y, width, height } = box(n, n === state.hovered ? Math.max(side, 64) * 1.15 : side);
      if (x > size[0] || y > size[1] || x + width < 0 || y + height < 0) return;
      const from = cell(n);
      context.drawImage(picture, from.x, from.y, from.width, from.height, x, y, width, height);
      if (coloured && items[n].label >= 0) {
        context.fillStyle = HUES[items[n].label];
        context.fillRect(x, y + height - 3, width, 3);
      }
      if (n === state.chosen) frame({ x, y, width, height }, outline, 3);
      else if (friends.has(n)) frame({ x, y, width, height }, accent, 2.5);
      else if (n === state.hovered) frame({ x, y, width, height }, ink, 1.5);
    };
    const behind = order.filter((n) => above(n) === 0);
    behind.forEach(single);
    if (state.chosen !== null) { // the others step back
      Object.assign(context, { fillStyle: ground, globalAlpha: VEIL });
      context.fillRect(0, 0, ...size);
      context.globalAlpha = 1;
      context.strokeStyle = accent;
      context.lineWidth = 1.5;
      context.beginPath();
      for (const n of friends) {
        context.moveTo(...place(state.chosen));
        context.lineTo(...place(n));
      }
      context.stroke();
    }
    order.slice(behind.length).forEach(single);
    if (state.from !== null) {
      if (performance.now() - state.since >= GLIDE) state.from = null;
      schedule();
    }
  }

  function schedule() {
    if (!scheduled) requestAnimationFrame(paint);
    scheduled = true;
  }

  function resize() {
    const dense = window.devicePixelRatio || 1, { clientWidth, clientHeight } = canvas;
    if (clientWidth === size[0] && clientHeight === size[1]) return;
    size = [clientWidth, clientHeight];
    Object.assign(canvas, { width: Math.round(clientWidth * dense), height: Math.round(clientHeight * dense) });
    schedule();
  }

  // Zoom so that a point of the canvas stays where it is.
  function zoom(factor, [x, y] = [size[0] / 2, size[1] / 2]) {
    const next = Math.min(DEEPEST, Math.max(1, state.zoom * factor)), real = next / state.zoom;
    state.x = (state.x + size[0] / 2 - x) * real + x - size[0] / 2;
    state.y = (state.y + size[1] / 2 - y) * real + y - size[1] / 2;
    state.zoom = next;
    move(0, 0);
  }

  function move(x, y) {
    const reach = [0, 1].map((axis) => ((size[axis] - PAD) * state.zoom) / 2); // some of the map stays in sight
    state.x = Math.min(reach[0], Math.max(-reach[0], state.x + x));
    state.y = Math.min(reach[1], Math.max(-reach[1], state.y + y));
    schedule();
  }

  function whole() {
    Object.assign(state, { zoom: 1, x: 0, y: 0 });
    schedule();
  }

  function show(name) {
    if (name !== state.moment) Object.assign(state, { from: state.moment, since: performance.now(), moment: name });
    for (const other of ["before", "after"]) by(`map-${other}`).setAttribute("aria-pressed", String(other === name));
    schedule();
  }

  // The item at a point of the canvas: the uppermost picture there.
  function itemAt([x, y]) {
    const side = sideOf();
    let found = null, least = Infinity;
    for (let n = 0; n < count; n++) {
      const one = box(n, side), inside = x >= one.x && x <= one.x + one.width && y >= one.y && y <= one.y + one.height;
      const distance = Math.hypot(one.x + one.width / 2 - x, one.y + one.height / 2 - y);
      if (inside && distance < least) [found, least] = [n, distance];
    }
    return found;
  }

  function choose(n, { scroll = false, centre = false } = {}) {
    state.chosen = n;
    if (n !== null && centre) {
      const [x, y] = place(n), margin = 60;
      if (x < margin || y < margin || x > size[0] - margin || y > size[1] - margin) move(size[0] / 2 - x, size[1] / 2 - y);
    }
    describe();
    schedule();
    if (scroll) by("map").scrollIntoView({ behavior: "smooth" });
  }

  function describe() {
    const aside = by("map-chosen"), n = state.chosen;
    if (n === null) {
      aside.replaceChildren(element("p", { className: "note", textContent: "Click a picture: here it stands with its nearest neighbours." }));
      return;
    }
    const { name, label } = items[n], about = [element("h3", { textContent: name })];
    if (label >= 0 && classes.length) about.push(element("p", { className: "note", textContent: `class ${classes[label]}` }));
    const rows = Object.keys(moments).reverse().flatMap((moment) => [element("h4", { textContent: `Nearest ${moment} training` }), row(moment, n, 8)]);
    aside.replaceChildren(...about, element("div", { className: "large" }, drawn(n, { square: false })), ...rows);
  }

  function listen() {
    const held = new Map(); // fingers and the mouse: where each is
    let moved = 0, span = 0;
    const at = (event) => {
      const outer = canvas.getBoundingClientRect();
      return [event.clientX - outer.left - canvas.clientLeft, event.clientY - outer.top - canvas.clientTop];
    };
    const middle = () => [0, 1].map((axis) => [...held.values()].reduce((sum, point) => sum + point[axis] / held.size, 0));
    const spread = () => { const [a, b] = [...held.values()]; return b ? Math.hypot(a[0] - b[0], a[1] - b[1]) : 0; };
    canvas.addEventListener("pointerdown", (event) => {
      if (held.size === 0) moved = 0;
      held.set(event.pointerId, at(event));
      canvas.setPointerCapture(event.pointerId);
      span = spread();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!held.has(event.pointerId)) {
        const found = itemAt(at(event));
        if (found !== state.hovered) {
          state.hovered = found;
          canvas.style.cursor = found === null ? "grab" : "pointer";
          canvas.title = found === null ? "" : items[found].name;
          schedule();
        }
        return;
      }
      const before = middle();
      held.set(event.pointerId, at(event));
      const now = middle(), wide = spread();
      moved += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]) + (held.size > 1 ? CLICK : 0);
      if (moved > CLICK) move(now[0] - before[0], now[1] - before[1]);
      if (held.size > 1 && span > 0) zoom(wide / span, now);
      span = wide;
    });
    const release = (event) => {
      const was = held.delete(event.pointerId);
      span = spread();
      if (was && event.type === "pointerup" && held.size === 0 && moved <= CLICK) choose(itemAt(at(event)));
    };
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => { state.hovered = null; schedule(); });
    canvas.addEventListener("wheel", (event) => {
      if (state.zoom === 1 && event.deltaY > 0) return; // the page scrolls on
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * (event.deltaMode === 0 ? 0.0016 : 0.05)), at(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
      const other = { "+": () => zoom(STEP), "=": () => zoom(STEP), "-": () => zoom(1 / STEP), 0: whole, Escape: () => choose(null) }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey || (step === undefined && other === undefined)) return;
      event.preventDefault();
      if (step) move(...step);
      else other();
    });
    by("map-in").addEventListener("click", () => zoom(STEP));
    by("map-out").addEventListener("click", () => zoom(1 / STEP));
    by("map-whole").addEventListener("click", whole);
    for (const name of ["before", "after"]) by(`map-${name}`).addEventListener("click", () => show(name));
    by("map-find").addEventListener("input", (event) => {
      const asked = event.target.value.trim().toLowerCase();
      const exact = items.findIndex(({ name }) => name.toLowerCase() === asked);
      const found = exact >= 0 ? exact : items.findIndex(({ name }) => name.toLowerCase().includes(asked));
      if (asked !== "" && found >= 0) choose(found, { centre: true });
    });
    new ResizeObserver(resize).observe(canvas);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", schedule);
  }

  // ---- the other sections

  function build() {
    by("map-names").append(...items.map(({ name }) => element("option", { value: name })));
    if (coloured) {
      by("map-legend").append(...classes.map((name, n) => {
        const mark = element("i");
        mark.style.background = HUES[n];
        return element("span", {}, mark, name);
      }));
    }
    for (const n of data.samples) {
      const columns = Object.keys(moments).map((moment) => element("div", {}, element("h4", { textContent: `${moment} training` }), row(moment, n, 6)));
      by("near-rows").append(element("div", { className: "near" }, thumb(n, items[n].name, { scroll: true }), ...columns));
    }
    by("act-copies").append(...data.copies.map(([first, second, correlation]) => element("figure", {},
      thumb(first, items[first].name, { scroll: true }), thumb(second, items[second].name, { scroll: true }),
      element("figcaption", { textContent: `correlation ${correlation.toFixed(3)}` }))));
    by("act-apart").append(...data.apart.map(([n, deviations]) => thumb(n, `${deviations.toFixed(1)} sd, ${items[n].name}`, { scroll: true })));
  }

  async function start() {
    picture.src = sheet.picture;
    await picture.decode();
    build();
    listen();
    resize();
    describe();
    paint();
  }

  // For tests and for the console.
  window.glpretrainMap = Object.freeze({
    ready: start(),
    chosen: () => state.chosen,
    choose: (n) => choose(n, { centre: true }),
    moment: () => state.moment,
    neighbours: (name, n) => nearest(name, n, Infinity),
    place: (n) => { const [x, y] = place(n); return [x / size[0], y / size[1]]; },
    itemAt: (x, y) => itemAt([x * size[0], y * size[1]]),
    zoom: () => state.zoom,
  });
})();
