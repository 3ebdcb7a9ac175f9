"use strict";
(() => {
  // Okabe and Ito's palette, darker or lighter where the ground asks for it; marker, dash and hatch say the same as colour.
  const LIGHT = { ink: "#1b1f24", muted: "#57606a", grid: "#e6e9ed", line: "#8c959f", paper: "#ffffff",
    hues: ["#0072B2", "#D55E00", "#009E73", "#A8487F", "#000000", "#B87A00", "#2E8BC0"],
    scale: [[0, "#eef4fa"], [0.5, "#6baed6"], [1, "#08306b"]] };
  const DARK = { ink: "#e8eaed", muted: "#a3abb5", grid: "#2b3037", line: "#6b7480", paper: "#14171b",
    hues: ["#56B4E9", "#E69F00", "#1FBF92", "#CC79A7", "#F0E442", "#F07A24", "#FFFFFF"],
    scale: [[0, "#1d2126"], [0.5, "#2a6f9e"], [1, "#c4e6ff"]] };
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "hexagon"];
  const HATCHES = ["", "/", "x", ".", "-", "\\", "|", "+"];
  const MARKED = 30;   // a line of more points than this shows no markers
  const PAPER = { width: 640, height: 320 }; // of a plot on paper, px

  const panels = JSON.parse(document.getElementById("panels").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)"); // a finger that moves over a plot scrolls the page
  const cut = (name) => { const at = name.indexOf(", "); return at < 0 ? [name, ""] : [name.slice(0, at), name.slice(at + 2)]; };
  const once = (list) => [...new Set(list)];
  // Plotly reads a little HTML in its texts; these are data and stay as they are.
  const plain = (value) => String(value).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const short = (value) => String(Number(value.toPrecision(4)));
  const all = panels.flatMap((panel) => panel.series || []).map((series) => cut(series.name));
  const groups = once(all.map(([group]) => group));
  const variants = once(all.map(([, variant]) => variant));

  const look = (panel, index, theme) => {
    const [group, variant] = cut(panel.series[index].name);
    const g = groups.indexOf(group);
    const inside = once(panel.series.map((series) => cut(series.name)[1]));
    return { hue: theme.hues[g % theme.hues.length], symbol: SYMBOLS[g % SYMBOLS.length],
      variant: inside.indexOf(variant), open: inside.indexOf(variant) % 2 === 1, g };
  };
  const fade = (hue, alpha) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hue.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  };
  const interval = (series) => series.y.map((y, i) => series.low ? ` [${short(series.low[i])}, ${short(series.high[i])}]` : "");

  const curve = (panel, theme) => {
    const bands = [], lines = [];
    panel.series.forEach((series, index) => {
      const style = look(panel, index, theme);
      const x = series.x.map((value) => typeof value === "string" ? plain(value) : value);
      const marked = x.length <= MARKED;
      if (series.low) {
        bands.push({ type: "scatter", mode: "lines", x: [...x, ...x.slice().reverse()],
          y: [...series.high, ...series.low.slice().reverse()], fill: "toself", fillcolor: fade(style.hue, 0.14),
          line: { width: 0, color: style.hue }, hoverinfo: "skip", showlegend: false, legendgroup: series.name });
      }
      lines.push({ type: "scatter", mode: marked ? "lines+markers" : "lines", x, y: series.y, name: plain(series.name),
        legendgroup: series.name, customdata: interval(series), hovertemplate: "%{y:.4~g}%{customdata}",
        line: { color: style.hue, width: 2.25, dash: DASHES[(marked ? style.variant : index) % DASHES.length] },
        marker: { symbol: style.symbol + (style.open ? "-open" : ""), size: 8, color: style.hue,
          line: { width: style.open ? 2 : 1, color: style.open ? style.hue : theme.paper } } });
    });
    return { data: [...bands, ...lines], layout: { hovermode: "x unified",
      xaxis: { title: { text: plain(panel.x_label) } }, yaxis: { title: { text: plain(panel.y_label) } } } };
  };

  const bars = (panel, theme) => ({
    data: panel.series.map((series, index) => {
      const style = look(panel, index, theme);
      const above = series.low && series.high.map((high, i) => high - series.y[i]);
      const below = series.low && series.low.map((low, i) => series.y[i] - low);
      return { type: "bar", x: series.x.map(plain), y: series.y, name: plain(series.name), customdata: interval(series),
        hovertemplate: "%{y:.4~g}%{customdata}",
        marker: { color: style.hue, line: { color: style.hue, width: 1 },
          pattern: { shape: HATCHES[index % HATCHES.length], fillmode: "replace", fgcolor: style.hue,
            bgcolor: fade(style.hue, 0.18), size: 7, solidity: 0.35 } },
        error_y: above ? { type: "data", array: above, arrayminus: below, symmetric: false, color: theme.ink,
          thickness: 1.5, width: 4 } : undefined };
    }),
    layout: { barmode: "group", bargap: 0.28, bargroupgap: 0.08, hovermode: "x unified",
      xaxis: { type: "category", categoryorder: "array", categoryarray: panel.categories.map(plain) },
      yaxis: { title: { text: plain(panel.y_label) }, rangemode: "tozero" } },
  });

  const heatmap = (panel, theme) => {
    const few = panel.x.length <= 12 && panel.x.length * panel.y.length <= 150;
    return {
      data: [{ type: "heatmap", x: panel.x.map(plain), y: panel.y.map(plain), z: panel.z, colorscale: theme.scale,
        xgap: 1, ygap: 1, hoverongaps: false, texttemplate: few ? "%{z:.3~g}" : "",
        hovertemplate: `%{y}, %{x}: %{z:.4~g}<extra></extra>`,
        colorbar: { thickness: 12, outlinewidth: 0, tickfont: { color: theme.muted }, len: 1 } }],
      layout: { xaxis: { type: "category", title: { text: plain(panel.x_label) }, showgrid: false },
        yaxis: { type: "category", title: { text: plain(panel.y_label) }, showgrid: false, autorange: "reversed" } },
    };
  };

  const KINDS = { curve, bars, heatmap };
  const merged = (axis, own) => ({ ...axis, ...own, title: { ...(own.title || {}), standoff: 8, font: { size: 13 } } });
  const draw = (theme, size = {}) => panels.forEach((panel, index) => {
    const place = document.getElementById(`plot-${index}`);
    if (!place) return;
    const rows = Math.max(0, (panel.series || []).length - 3) * (place.clientWidth < 560 ? 1 : 0.4); // of the legend
    if (!size.height) place.style.height = rows ? `calc(var(--plot) + ${Math.ceil(rows) * 19}px)` : "";
    const { data, layout } = KINDS[panel.kind](panel, theme);
    const axis = { color: theme.ink, gridcolor: theme.grid, linecolor: theme.line, tickcolor: theme.line, ticks: "outside",
      ticklen: 4, showline: true, zeroline: false, automargin: true,
      fixedrange: touch.matches, tickfont: { size: 12, color: theme.muted } };
    Plotly.react(place, data, { ...layout, xaxis: merged({ ...axis, showgrid: false }, layout.xaxis),
      yaxis: merged(axis, layout.yaxis), ...size, autosize: !size.width, paper_bgcolor: theme.paper, plot_bgcolor: theme.paper,
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif", size: 13, color: theme.ink },
      margin: { l: 12, r: 12, t: 12, b: 12 }, showlegend: (panel.series || []).length > 1,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 13 } },
      hoverlabel: { bgcolor: theme.paper, bordercolor: theme.line, font: { color: theme.ink } },
      dragmode: touch.matches ? false : "zoom",
    }, { responsive: true, displayModeBar: false });
  });
  const drawScreen = () => draw(dark.matches ? DARK : LIGHT);
  drawScreen();
  dark.addEventListener("change", drawScreen);
  window.addEventListener("beforeprint", () => draw(LIGHT, PAPER));
  window.addEventListener("afterprint", drawScreen);

  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const key = (row) => row.cells[column].dataset.value;
      const numeric = head.classList.contains("number");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [left, right] = [key(a), key(b)];
        if (left === undefined || right === undefined) return (left === undefined) - (right === undefined); // empty cells last
        return sign * (numeric ? Number(left) - Number(right) : left.localeCompare(right, "en", { numeric: true }));
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    }));
  });

  document.querySelectorAll("button[data-format]").forEach((button) => button.addEventListener("click", () => {
    const place = document.getElementById(`plot-${button.dataset.plot}`);
    const { width, height } = place.getBoundingClientRect();
    const format = button.dataset.format;
    Plotly.downloadImage(place, { format, width, height, scale: format === "png" ? 3 : 1, filename: button.dataset.name });
  }));

  document.querySelectorAll(".command button").forEach((button) => button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(text); // no clipboard here: the reader presses the keys
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }));
})();
