// Makes dist/page.html: one file with everything in it, which any static server can offer.
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";

import { build } from "esbuild";

const { outputFiles } = await build({
  entryPoints: ["page.mjs"],
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  write: false,
});
// In HTML a script ends at the first `</script`, wherever it stands.
const code = outputFiles[0].text.trim().replaceAll("</script", "<\\/script");
const template = readFileSync("page.html", "utf8");
const style = /<style>([^]*?)<\/style>/.exec(template)[1];

// The policy names what may run by its digest: nothing that an answer contains ever does.
const digest = (text) => `sha256-${createHash("sha256").update(text).digest("base64")}`;
mkdirSync("dist", { recursive: true });
writeFileSync(
  "dist/page.html",
  template
    .replace("%STYLE%", digest(style))
    .replace("%SCRIPT%", () => digest(code))
    .replace("%CODE%", () => code),
);
