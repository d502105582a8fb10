"use strict";

// Everything here draws what was computed before: there are no statistics in this file.
(() => {
  const NARROW = 700;
  const SUGGESTIONS = 40;
  const CONFIG = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
  const INK = "#1d2530";
  const LAYOUT = {
    font: {family: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 13, color: INK},
    paper_bgcolor: "#ffffff",
    plot_bgcolor: "#ffffff",
    hoverlabel: {align: "left", namelength: -1},
  };
  const AXIS = {gridcolor: "#e4e8ed", zerolinecolor: "#c6ccd4", linecolor: "#9aa4b0", ticks: "outside", tickcolor: "#9aa4b0",
    automargin: true};
  const byId = (id) => document.getElementById(id);

  async function unpack(id) {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  // Names come from data. Plotly reads a few HTML tags in its texts, so what could begin one is written as an entity.
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function fill(select, names, chosen) {
    for (const name of names) {
      const option = document.createElement("option");
      option.textContent = name;
      option.selected = name === chosen;
      select.append(option);
    }
  }

  function seriesOf(arm, curve, axes, shown) {
    const {epochs, mean, sd} = curve;
    const common = {legendgroup: arm.label, xaxis: axes[0], yaxis: axes[1]};
    const text = mean.map((value, i) => (sd.length ? `${value} ± ${sd[i]} (${arm.seeds} seeds)` : `${value}`));
    const traces = [{...common, x: epochs, y: mean, text, type: "scatter", mode: "lines", name: escaped(arm.label), showlegend: shown,
      line: {color: arm.color, dash: arm.dash, width: 2}, hovertemplate: "%{text}"}];
    if (sd.length) {
      traces.push({...common, x: [...epochs, ...[...epochs].reverse()],
        y: [...mean.map((value, i) => value + sd[i]), ...mean.map((value, i) => value - sd[i]).reverse()],
        type: "scatter", mode: "lines", line: {width: 0}, fill: "toself", fillcolor: arm.color, opacity: 0.18, hoverinfo: "skip",
        showlegend: false, name: escaped(arm.label)});
    }
    return traces;
  }

  function drawCurves(number, curves) {
    const plot = byId(`curves-${number}`);
    const select = byId(`metric-${number}`);
    if (!plot) return;
    fill(select, curves.metrics, curves.chosen);
    const layout = () => {
      const narrow = plot.clientWidth < NARROW;
      return {
        ...LAYOUT,
        hovermode: "x unified",
        margin: {l: 60, r: 12, t: 30, b: 40},
        legend: {orientation: "h", y: 1.02, yanchor: "bottom", groupclick: "togglegroup"},
        xaxis: {...AXIS, title: {text: "epoch"}, rangemode: "tozero", domain: narrow ? [0, 1] : [0, 0.46], anchor: "y"},
        yaxis: {...AXIS, title: {text: `validation ${select.value}`}, rangemode: "tozero", domain: narrow ? [0.56, 1] : [0, 1]},
        xaxis2: {...AXIS, title: {text: "epoch"}, rangemode: "tozero", domain: narrow ? [0, 1] : [0.55, 1], anchor: "y2"},
        yaxis2: {...AXIS, title: {text: "training loss"}, domain: narrow ? [0, 0.44] : [0, 1], anchor: "x2"},
      };
    };
    const traces = () => curves.arms.flatMap((arm) => {
      const validation = arm.validation[select.value] || {epochs: [], mean: [], sd: []};
      const best = validation.mean.length ? validation.mean.indexOf(Math.max(...validation.mean)) : -1;
      const dots = best < 0 ? [] : [{x: [validation.epochs[best]], y: [validation.mean[best]], type: "scatter", mode: "markers",
        marker: {color: arm.color, size: 9}, legendgroup: arm.label, showlegend: false, hoverinfo: "skip",
        name: escaped(arm.label)}];
      return [...seriesOf(arm, validation, ["x", "y"], true), ...dots, ...seriesOf(arm, arm.loss, ["x2", "y2"], false)];
    });
    Plotly.newPlot(plot, traces(), layout(), CONFIG);
    select.addEventListener("change", () => {
      const hidden = new Set(plot.data.filter((trace) => trace.visible === "legendonly").map((trace) => trace.legendgroup));
      const next = traces().map((trace) => (hidden.has(trace.legendgroup) ? {...trace, visible: "legendonly"} : trace));
      Plotly.react(plot, next, layout(), CONFIG);
    });
    let narrow = plot.clientWidth < NARROW;
    addEventListener("resize", () => {
      if (narrow !== plot.clientWidth < NARROW) {
        narrow = !narrow;
        Plotly.relayout(plot, layout());
      }
    });
  }

  function drawBars(number, place, group) {
    const traces = group.arms.map((arm) => ({x: group.columns.map(escaped), y: arm.values, type: "bar", name: escaped(arm.label),
      marker: {color: arm.color}, hovertemplate: "%{y}"}));
    Plotly.newPlot(byId(`bars-${number}-${place}`), traces, {...LAYOUT, barmode: "group", hovermode: "x unified",
      margin: {l: 60, r: 12, t: 10, b: 40}, legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, xaxis: {...AXIS, type: "category"},
      yaxis: {...AXIS, title: {text: group.metric}}}, CONFIG);
  }

  function drawDegrees(number, place, degrees) {
    const x = [];
    const y = [];
    degrees.counts.forEach((count, degree) => {
      if (count) {
        x.push(degree);
        y.push(count);
      }
    });
    // Powers of ten alone, or over few of them 2 and 5 as well.
    const axis = (values, text) => {
      const steps = Math.max(...values) > 200 ? [1] : [1, 2, 5];
      const tickvals = [0, 1, 2, 3, 4, 5, 6, 7, 8].flatMap((power) => steps.map((step) => step * 10 ** power));
      return {...AXIS, type: "log", tickvals, ticktext: tickvals.map((value) => value.toLocaleString("en")), title: {text}};
    };
    // A logarithmic axis has no 0: isolated nodes stand in the table.
    Plotly.newPlot(byId(`degrees-${number}-${place}`), [{x, y, type: "scatter", mode: "markers", marker: {color: "#0072b2", size: 6},
      hovertemplate: "%{y:,} nodes with %{x:,} neighbours<extra></extra>"}],
    {...LAYOUT, margin: {l: 60, r: 12, t: 10, b: 40}, xaxis: axis(x, "neighbours"), yaxis: axis(y, "nodes")}, CONFIG);
  }

  class Items {
    constructor(number, items) {
      this.items = items;
      this.input = byId(`item-${number}`);
      this.options = byId(`items-${number}`);
      this.heading = byId(`near-${number}`);
      this.table = byId(`neighbours-${number}`);
      this.arm = byId(`arm-${number}`);
      this.projection = byId(`projection-${number}`);
      this.plot = byId(`map-${number}`);
      this.lower = items.names.map((name) => name.toLowerCase());
      this.places = new Map(items.drawn.map((item, place) => [item, place]));
      const labels = items.arms.map((arm) => arm.label);
      fill(this.arm, labels, labels[labels.length > 1 ? 1 : 0]);
      fill(this.projection, Object.keys(items.arms[0].maps), Object.keys(items.arms[0].maps).at(-1));
      this.chosen = items.first;
      this.input.value = items.names[this.chosen];
      this.suggest("");
      this.input.addEventListener("input", () => this.typed(false));
      this.input.addEventListener("change", () => this.typed(true));
      this.arm.addEventListener("change", () => this.drawMap());
      this.projection.addEventListener("change", () => this.drawMap());
      this.list();
      this.drawMap();
      this.plot.on("plotly_click", (event) => {
        const item = event.points[0].customdata;
        if (item !== undefined) this.choose(item);
      });
    }

    // The item of a name or, if a part of it will do, the first with that part; -1: there is none.
    find(text, whole) {
      const exact = this.items.names.indexOf(text);
      return exact >= 0 || whole ? exact : this.lower.findIndex((name) => name.includes(text.toLowerCase()));
    }

    suggest(text) {
      const wanted = text.toLowerCase();
      const found = [];
      for (let i = 0; i < this.lower.length && found.length < SUGGESTIONS; i++) if (this.lower[i].includes(wanted)) found.push(i);
      this.options.replaceChildren(...found.map((i) => {
        const option = document.createElement("option");
        option.value = this.items.names[i];
        return option;
      }));
    }

    // While somebody types, only a whole name chooses an item.
    typed(done) {
      const text = this.input.value.trim();
      this.suggest(text);
      const item = text ? this.find(text, !done) : -1;
      if (item >= 0) this.choose(item, done);
      else if (done && text) this.heading.textContent = `No item is called ${text}`;
    }

    choose(item, rename = true) {
      this.chosen = item;
      if (rename) this.input.value = this.items.names[item];
      this.list();
      this.mark();
    }

    list() {
      const {names, arms, counts} = this.items;
      const item = this.chosen;
      const known = counts ? ` (${counts[item].toLocaleString("en")} training interactions)` : "";
      this.heading.textContent = `Nearest to ${names[item]}${known}`;
      const head = document.createElement("thead");
      const cell = (row, kind, text) => {
        const made = document.createElement(kind);
        made.textContent = text;
        row.append(made);
        return made;
      };
      const top = head.insertRow();
      for (const [i, text] of ["", ...arms.map((arm) => arm.label)].entries()) {
        const made = cell(top, i ? "th" : "td", text);
        if (i) made.scope = "col";
      }
      const body = document.createElement("tbody");
      arms[0].neighbours[item].forEach((_, rank) => {
        const row = body.insertRow();
        cell(row, "th", rank + 1).scope = "row";
        for (const arm of arms) {
          const made = cell(row, "td", names[arm.neighbours[item][rank]]);
          const small = document.createElement("small");
          small.textContent = arm.cosines[item][rank].toFixed(2) + (arm.linked && arm.linked[item][rank] ? " ●" : "");
          made.append(small);
        }
      });
      this.table.replaceChildren(head, body);
    }

    current() {
      return this.items.arms[this.arm.selectedIndex];
    }

    map() {
      return this.current().maps[this.projection.value];
    }

    ringed() {
      const map = this.map();
      const near = this.current().neighbours[this.chosen];
      const shown = [this.chosen, ...near].filter((item) => this.places.has(item));
      const places = shown.map((item) => this.places.get(item));
      return {x: places.map((place) => map.x[place]), y: places.map((place) => map.y[place]), shown,
        widths: shown.map((item) => (item === this.chosen ? 3 : 1.5)), sizes: shown.map((item) => (item === this.chosen ? 16 : 11))};
    }

    drawMap() {
      const {names, drawn, counts} = this.items;
      const map = this.map();
      const color = counts ? drawn.map((item) => Math.log10(counts[item] + 1)) : "#0072b2";
      const ticks = [0, 1, 10, 100, 1000, 10000, 100000];
      const bar = {title: {text: "training<br>interactions"}, tickvals: ticks.map((x) => Math.log10(x + 1)), ticktext: ticks, thickness: 12,
        len: 0.7};
      if (this.plot.clientWidth < NARROW) Object.assign(bar, {orientation: "h", y: -0.12, yanchor: "top", len: 1});
      const axis = (i) => ({...AXIS, title: {text: map.axes[i]}, showticklabels: false, ticks: "", zeroline: false});
      const ring = this.ringed();
      const hovertemplate = "%{text}<extra></extra>";
      const traces = [
        {x: map.x, y: map.y, text: drawn.map((item) => escaped(names[item])), customdata: drawn, type: "scatter", mode: "markers",
          marker: {size: 6, opacity: 0.75, color, colorscale: "Viridis", reversescale: true, showscale: Boolean(counts), colorbar: bar},
          hovertemplate, showlegend: false},
        {x: ring.x, y: ring.y, text: ring.shown.map((item) => escaped(names[item])), customdata: ring.shown, type: "scatter",
          mode: "markers", hovertemplate, showlegend: false,
          marker: {symbol: "circle-open", size: ring.sizes, color: "#c2410c", line: {width: ring.widths}}},
      ];
      Plotly.react(this.plot, traces, {...LAYOUT, hovermode: "closest", margin: {l: 40, r: 12, t: 10, b: 40}, xaxis: axis(0),
        yaxis: axis(1)}, CONFIG);
    }

    mark() {
      const ring = this.ringed();
      Plotly.restyle(this.plot, {x: [ring.x], y: [ring.y], text: [ring.shown.map((item) => escaped(this.items.names[item]))],
        customdata: [ring.shown], "marker.size": [ring.sizes], "marker.line.width": [ring.widths]}, [1]);
    }
  }

  async function main() {
    if (!("DecompressionStream" in window)) throw new Error("this browser is too old for the pictures; the tables are complete");
    const script = document.createElement("script");
    script.textContent = await unpack("plotly");
    document.head.append(script);
    const groups = JSON.parse(await unpack("payload"));
    groups.forEach((group, number) => {
      if (group.curves) drawCurves(number, group.curves);
      group.groups.forEach((found, place) => drawBars(number, place, found));
      group.degrees.forEach((found, place) => drawDegrees(number, place, found));
      if (group.items) new Items(number, group.items);
    });
    document.body.dataset.drawn = "yes";
  }

  main().catch((error) => {
    const failure = byId("failure");
    failure.textContent = `The pictures cannot be drawn: ${error.message}.`;
    failure.hidden = false;
    throw error;
  });
})();
