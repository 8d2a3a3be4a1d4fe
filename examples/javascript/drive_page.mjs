// Uses dist/page.html as a person would, in a real Chromium, and prints what it saw as one line of JSON.
//
//   node drive_page.mjs CHROMIUM PAGE_URL MESH_URL TOKEN
import puppeteer from "puppeteer-core";

const [executablePath, page_url, mesh, token] = process.argv.slice(2);
const browser = await puppeteer.launch({
  executablePath,
  // A container's root has no namespaces to build the sandbox from; the one page here is our own.
  args: process.getuid() === 0 ? ["--no-sandbox"] : [],
});
const seen = {};
const problems = [];
try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => {
    if (message.type() === "error") problems.push(message.text());
  });
  await page.goto(page_url);
  await fill(page, { mesh, token });

  await ask(page, { prompt: "What is the capital of France?", tokens: 20, deadline: 60 });
  await told(page, /^finished/);
  seen.finished = await look(page);

  const long = { prompt: "Tell me a very long story about a fox.", tokens: 1500 };
  await ask(page, { ...long, deadline: 60 });
  await page.waitForFunction("document.querySelector('#answer').textContent.length > 20");
  await page.click("#stop");
  await told(page, /^Canceled/);
  seen.cancelled = await look(page);

  // Time for some of the story on a slow machine, for all of it on none.
  await ask(page, { ...long, deadline: 5 });
  await told(page, /^DeadlineExceeded/);
  seen.late = await look(page);

  // A refusal is what was asked for here; the browser may log it.
  await fill(page, { token: "nonsense" });
  await ask(page, { prompt: "hi", tokens: 5, deadline: 60 });
  await told(page, /^Unauthenticated/);
  seen.refused = await look(page);
} finally {
  await browser.close();
}
console.log(JSON.stringify({ ...seen, problems }));

async function ask(page, fields) {
  await fill(page, fields);
  await page.click("#ask");
}

async function fill(page, fields) {
  for (const [name, value] of Object.entries(fields)) {
    await page.$eval(`[name=${name}]`, (field, text) => (field.value = text), String(value));
  }
}

async function told(page, pattern) {
  await page.waitForFunction(
    (source) => new RegExp(source).test(document.querySelector("#status").textContent),
    { timeout: 60_000 },
    pattern.source,
  );
}

async function look(page) {
  return page.evaluate(() => ({
    status: document.querySelector("#status").textContent,
    answer: document.querySelector("#answer").textContent,
  }));
}
