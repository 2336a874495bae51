// The same request for a terminal (sh, bash, zsh).

const SMALL = 50_000; // characters of a data URL that are still copied; of larger files the command reads the file

const inHeredoc = (text) => text.replace(/[\\$`]/g, "\\$&");
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/**
 * @param {object} body the request
 * @param {Medium[]} media its files, in order
 * @param {boolean} key whether the server asks for a key
 */
export function curl(body, media, key) {
  let next = 0;
  const files = [];
  const text = JSON.stringify(body, (name, value) => {
    if (name !== "url") return value;
    const { name: file, blob } = media[next++];
    if (value.length <= SMALL) return value;
    files.push(`data:${blob.type};base64,$(base64 < ${quoted(file)} | tr -d '\\n')`);
    return `\u0000${files.length - 1}\u0000`;
  });
  const document = inHeredoc(text).replace(/\\\\u0000(\d+)\\\\u0000/g, (all, number) => files[number] ?? all);
  const address = new URL("v1/chat/completions", location.href);
  const authorization = key ? ' -H "Authorization: Bearer $API_KEY"' : "";
  return `curl ${address} -H 'Content-Type: application/json'${authorization} --data-binary @- <<EOF\n${document}\nEOF\n`;
}
